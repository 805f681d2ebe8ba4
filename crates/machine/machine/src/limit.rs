//! What bandwidth groups may have: a token bucket for each, which several cards or disks may share.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use tm::{Nanos, Timer, TimerHandler, TimerQueue};

/// What may pass at once after a pause, at least.
const MIN_BURST: u64 = 64 << 10;
const SECOND: u64 = 1_000_000_000;

/// Told when a limit that was closed to it may be open again.
pub trait Waiter: Send + Sync {
    fn go_on(&self);
}

/// The state of a limit: what may pass before something has to wait. Goes below zero, so that what is longer than a burst passes.
struct Bucket {
    /// Bytes per second; 0 for no limit.
    rate: u64,
    tokens: i64,
    filled: Nanos,
    /// Who waits for tokens.
    waiting: Vec<Weak<dyn Waiter>>,
}

impl Bucket {
    fn burst(&self) -> i64 {
        (self.rate / 10).max(MIN_BURST) as i64
    }

    /// Adds what time has brought, in whole bytes.
    fn fill(&mut self, now: Nanos) {
        let bytes = u128::from(now.saturating_sub(self.filled)) * u128::from(self.rate) / u128::from(SECOND);
        if bytes > 0 {
            self.filled += (bytes * u128::from(SECOND) / u128::from(self.rate.max(1))) as u64;
            let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
            self.tokens = self.tokens.saturating_add(bytes);
        }
        if self.tokens >= self.burst() {
            (self.tokens, self.filled) = (self.burst(), now);
        }
    }

    /// When there is a token again.
    fn ready_at(&self, now: Nanos) -> Nanos {
        let missing = (1 - self.tokens).max(1) as u128;
        let wait = (missing * u128::from(SECOND)).div_ceil(u128::from(self.rate.max(1)));
        now.saturating_add(u64::try_from(wait).unwrap_or(u64::MAX))
    }
}

/// A bandwidth group's limit.
pub struct Limit {
    timer: Timer,
    bucket: Mutex<Bucket>,
}

impl Limit {
    fn new(rate: u64, timers: &Arc<TimerQueue>) -> Arc<Self> {
        Arc::new_cyclic(|me: &Weak<Self>| {
            let timer = timers.create(me.clone(), 0);
            let mut bucket = Bucket { rate, tokens: 0, filled: timer.clock().now(), waiting: Vec::new() };
            bucket.tokens = bucket.burst();
            Self { timer, bucket: Mutex::new(bucket) }
        })
    }

    /// Changes the limit; those that wait look again.
    fn set_rate(&self, rate: u64) {
        let mut bucket = self.bucket.lock();
        let now = self.timer.clock().now();
        bucket.fill(now);
        bucket.rate = rate;
        bucket.tokens = bucket.tokens.min(bucket.burst());
        if !bucket.waiting.is_empty() {
            self.timer.arm(now);
        }
    }

    /// Whether something may pass; if not, `waiter` is told when the next may.
    pub fn is_open(&self, waiter: &Weak<dyn Waiter>) -> bool {
        let mut bucket = self.bucket.lock();
        if bucket.rate == 0 {
            return true;
        }
        let now = self.timer.clock().now();
        bucket.fill(now);
        if bucket.tokens > 0 {
            return true;
        }
        if !bucket.waiting.iter().any(|other| other.ptr_eq(waiter)) {
            bucket.waiting.push(waiter.clone());
        }
        self.timer.arm(bucket.ready_at(now));
        false
    }

    /// `len` bytes have passed.
    pub fn charge(&self, len: usize) {
        let mut bucket = self.bucket.lock();
        if bucket.rate != 0 {
            bucket.tokens -= len as i64;
        }
    }
}

impl TimerHandler for Limit {
    fn timer_fired(&self, _timer: u32, _now: Nanos) {
        // They come back to the bucket from inside `go_on`, so its lock is free then.
        let waiting = std::mem::take(&mut self.bucket.lock().waiting);
        waiting.iter().filter_map(Weak::upgrade).for_each(|waiter| waiter.go_on());
    }
}

/// The limits of a machine's bandwidth groups, by their names.
pub struct Limits {
    timers: Arc<TimerQueue>,
    groups: Mutex<BTreeMap<String, Arc<Limit>>>,
}

impl Limits {
    pub fn new(timers: &Arc<TimerQueue>) -> Arc<Self> {
        Arc::new(Self { timers: timers.clone(), groups: Mutex::default() })
    }

    /// The limit of a group, set to `rate` bytes per second; 0 for none.
    pub fn set(&self, name: &str, rate: u64) -> Arc<Limit> {
        let mut groups = self.groups.lock();
        let limit = groups.entry(name.to_owned()).or_insert_with(|| Limit::new(rate, &self.timers));
        limit.set_rate(rate);
        limit.clone()
    }

    /// The limit of a group that is known.
    pub fn get(&self, name: &str) -> Option<Arc<Limit>> {
        self.groups.lock().get(name).cloned()
    }
}
