//! TM, the time manager: the guest's virtual clock and the timers that devices set on it.
//!
//! Virtual time is nanoseconds since power-on, standing still while the VM is paused. Devices derive their
//! ticks from it by an exact ratio from one origin ([`ticks`]), never by adding up rounded periods. Timers
//! fire on one thread of the queue's own; a device's `timer_fired` runs there with the device's lock held.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, RwLock};

/// Virtual time in nanoseconds since power-on.
pub type Nanos = u64;

const NANOS_PER_SECOND: u128 = 1_000_000_000;

/// The number of whole ticks of a `hz` clock that have passed at virtual time `now`.
pub fn ticks(now: Nanos, hz: u64) -> u64 {
    (u128::from(now) * u128::from(hz) / NANOS_PER_SECOND) as u64
}

/// The earliest virtual time at which tick number `tick` of a `hz` clock has been reached, so that
/// `ticks(deadline(t, hz), hz) == t`. Saturates instead of wrapping.
pub fn deadline(tick: u64, hz: u64) -> Nanos {
    let hz = u128::from(hz.max(1));
    u64::try_from((u128::from(tick) * NANOS_PER_SECOND).div_ceil(hz)).unwrap_or(u64::MAX)
}

enum Source {
    Host { origin: Instant },
    Counter { read: Box<dyn Fn() -> u64 + Send + Sync>, hz: u64, origin: u64 },
    Manual,
}

/// Where a counter's clock started to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Anchor {
    /// The counter's value then.
    pub counter: u64,
    /// Virtual time then.
    pub time: Nanos,
}

struct ClockState {
    source: Source,
    /// Virtual time at `origin` (running host clock), or the time itself (stopped or manual).
    base: Nanos,
    running: bool,
}

/// The virtual clock. It starts stopped at zero.
pub struct Clock {
    state: RwLock<ClockState>,
}

impl Clock {
    /// A clock that follows the host's monotonic clock while it runs.
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            state: RwLock::new(ClockState {
                source: Source::Host { origin: Instant::now() },
                base: 0,
                running: false,
            }),
        })
    }

    /// A clock that follows a counter of `hz` ticks per second while it runs. The counter must not go backwards, whatever thread reads it.
    pub fn from_counter(hz: u64, read: Box<dyn Fn() -> u64 + Send + Sync>) -> Arc<Self> {
        Arc::new(Self {
            state: RwLock::new(ClockState {
                source: Source::Counter { read, hz: hz.max(1), origin: 0 },
                base: 0,
                running: false,
            }),
        })
    }

    /// A clock that only [`Clock::advance`] moves, for tests.
    pub fn manual() -> Arc<Self> {
        Arc::new(Self { state: RwLock::new(ClockState { source: Source::Manual, base: 0, running: false }) })
    }

    /// Virtual time now.
    pub fn now(&self) -> Nanos {
        let state = self.state.read();
        match state.source {
            Source::Host { origin } if state.running => {
                state.base.saturating_add(u64::try_from(origin.elapsed().as_nanos()).unwrap_or(u64::MAX))
            }
            Source::Counter { ref read, hz, origin } if state.running => {
                let passed = u128::from(read().saturating_sub(origin)) * NANOS_PER_SECOND / u128::from(hz);
                state.base.saturating_add(u64::try_from(passed).unwrap_or(u64::MAX))
            }
            _ => state.base,
        }
    }

    /// Where a clock made by [`Clock::from_counter`] started to run last; `None` while it stands still and for other clocks.
    pub fn anchor(&self) -> Option<Anchor> {
        let state = self.state.read();
        match state.source {
            Source::Counter { origin, .. } if state.running => {
                Some(Anchor { counter: origin, time: state.base })
            }
            _ => None,
        }
    }

    /// Ticks per second of the counter that a clock made by [`Clock::from_counter`] follows.
    pub fn counter_hz(&self) -> Option<u64> {
        match self.state.read().source {
            Source::Counter { hz, .. } => Some(hz),
            _ => None,
        }
    }

    /// Lets time run on from where it stands.
    pub fn start(&self) {
        let mut state = self.state.write();
        if !state.running {
            state.running = true;
            match &mut state.source {
                Source::Host { origin } => *origin = Instant::now(),
                Source::Counter { read, origin, .. } => *origin = read(),
                Source::Manual => {}
            }
        }
    }

    /// Stops time. Timers do not fire until [`Clock::start`].
    pub fn stop(&self) {
        let now = self.now();
        let mut state = self.state.write();
        state.base = now;
        state.running = false;
    }

    pub fn is_running(&self) -> bool {
        self.state.read().running
    }

    /// Whether only [`Clock::advance`] moves the clock.
    pub fn is_manual(&self) -> bool {
        matches!(self.state.read().source, Source::Manual)
    }

    /// Sets virtual time, when a saved state is restored; the clock must be stopped.
    pub fn set(&self, now: Nanos) {
        self.state.write().base = now;
    }

    /// Moves a manual clock forward.
    pub fn advance(&self, by: Nanos) {
        let mut state = self.state.write();
        debug_assert!(matches!(state.source, Source::Manual));
        state.base += by;
    }
}

/// What a timer calls. Implemented for `Mutex<D>` of every device with timers.
pub trait TimerHandler: Send + Sync {
    /// `timer` is the number given to [`TimerQueue::create`]; `now` is at or after the deadline that was set.
    fn timer_fired(&self, timer: u32, now: Nanos);
}

/// A device with timers.
pub trait TimerTarget: Send {
    /// Runs on the timer thread with the device's lock held. The timer is disarmed when this is called.
    fn timer_fired(&mut self, timer: u32, now: Nanos);
}

impl<D: TimerTarget> TimerHandler for Mutex<D> {
    fn timer_fired(&self, timer: u32, now: Nanos) {
        self.lock().timer_fired(timer, now);
    }
}

/// Builds a device that holds timers of its own: `build` gets the handler to create them with.
pub fn with_timers<D: TimerTarget + 'static>(
    build: impl FnOnce(Weak<dyn TimerHandler>) -> D,
) -> Arc<Mutex<D>> {
    Arc::new_cyclic(|weak: &Weak<Mutex<D>>| Mutex::new(build(weak.clone())))
}

struct Entry {
    handler: Weak<dyn TimerHandler>,
    number: u32,
    /// The armed deadline; heap entries that do not match it are stale.
    deadline: Option<Nanos>,
}

#[derive(Default)]
struct QueueState {
    timers: HashMap<u64, Entry>,
    heap: BinaryHeap<Reverse<(Nanos, u64)>>,
    next_id: u64,
}

/// All timers of a VM.
pub struct TimerQueue {
    clock: Arc<Clock>,
    state: Mutex<QueueState>,
    wake: Condvar,
    quit: AtomicBool,
}

/// One timer; dropping it disarms it. Armed from any thread, also inside the owner's lock.
pub struct Timer {
    queue: Arc<TimerQueue>,
    id: u64,
}

impl TimerQueue {
    pub fn new(clock: Arc<Clock>) -> Arc<Self> {
        Arc::new(Self { clock, state: Mutex::default(), wake: Condvar::new(), quit: AtomicBool::new(false) })
    }

    pub fn clock(&self) -> &Arc<Clock> {
        &self.clock
    }

    /// Creates a disarmed timer that calls `handler.timer_fired(number, …)`.
    pub fn create(self: &Arc<Self>, handler: Weak<dyn TimerHandler>, number: u32) -> Timer {
        let mut state = self.state.lock();
        let id = state.next_id;
        state.next_id += 1;
        state.timers.insert(id, Entry { handler, number, deadline: None });
        Timer { queue: self.clone(), id }
    }

    /// Fires every timer due at the clock's present time; returns the next deadline. Tests with a manual clock
    /// call it themselves; in a VM [`TimerQueue::run`] does.
    pub fn fire_due(&self) -> Option<Nanos> {
        loop {
            let (handler, number, now) = {
                let mut state = self.state.lock();
                let &Reverse((deadline, id)) = state.heap.peek()?;
                let live = state.timers.get(&id).is_some_and(|t| t.deadline == Some(deadline));
                if !live {
                    state.heap.pop();
                    continue;
                }
                let now = self.clock.now();
                if deadline > now {
                    return Some(deadline);
                }
                state.heap.pop();
                let Some(entry) = state.timers.get_mut(&id) else { continue };
                entry.deadline = None;
                (entry.handler.clone(), entry.number, now)
            };
            if let Some(handler) = handler.upgrade() {
                handler.timer_fired(number, now);
            }
        }
    }

    /// The timer thread's body: fires timers until [`TimerQueue::quit`]. With a manual clock that is the business of whoever moves it.
    pub fn run(&self) {
        let runs = || self.clock.is_running() && !self.clock.is_manual();
        while !self.quit.load(Ordering::Acquire) {
            let next = if runs() { self.fire_due() } else { None };
            let mut state = self.state.lock();
            if self.quit.load(Ordering::Acquire) {
                return;
            }
            // A timer armed since fire_due() looked must not be slept over.
            let head = state.heap.peek().map(|&Reverse((deadline, _))| deadline);
            match head {
                Some(deadline) if runs() => {
                    if next.is_none_or(|seen| deadline < seen) {
                        continue;
                    }
                    let now = self.clock.now();
                    if deadline > now {
                        self.wake.wait_for(&mut state, Duration::from_nanos(deadline - now));
                    }
                }
                _ => self.wake.wait(&mut state),
            }
        }
    }

    /// Makes the timer thread look again, after the clock was started or stopped.
    pub fn poke(&self) {
        let _state = self.state.lock();
        self.wake.notify_all();
    }

    /// Ends [`TimerQueue::run`].
    pub fn quit(&self) {
        self.quit.store(true, Ordering::Release);
        self.poke();
    }
}

impl Timer {
    /// Arms the timer for virtual time `deadline` (at once if that has passed), replacing an earlier deadline.
    pub fn arm(&self, deadline: Nanos) {
        let mut state = self.queue.state.lock();
        let Some(entry) = state.timers.get_mut(&self.id) else { return };
        if entry.deadline == Some(deadline) {
            return;
        }
        entry.deadline = Some(deadline);
        let first = state.heap.peek().is_none_or(|&Reverse((head, _))| deadline < head);
        state.heap.push(Reverse((deadline, self.id)));
        // A guest may re-arm far more often than it lets a timer fire: drop the stale entries now and then.
        if state.heap.len() > 64 + 4 * state.timers.len() {
            let QueueState { timers, heap, .. } = &mut *state;
            heap.retain(|&Reverse((at, id))| timers.get(&id).is_some_and(|t| t.deadline == Some(at)));
        }
        if first {
            self.queue.wake.notify_one();
        }
    }

    /// Arms at `Some(deadline)`, disarms at `None`.
    pub fn set(&self, deadline: Option<Nanos>) {
        match deadline {
            Some(deadline) => self.arm(deadline),
            None => self.disarm(),
        }
    }

    pub fn disarm(&self) {
        if let Some(entry) = self.queue.state.lock().timers.get_mut(&self.id) {
            entry.deadline = None;
        }
    }

    /// The clock that the deadlines refer to.
    pub fn clock(&self) -> &Arc<Clock> {
        &self.queue.clock
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        self.queue.state.lock().timers.remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Count(Vec<(u32, Nanos)>);
    impl TimerTarget for Count {
        fn timer_fired(&mut self, timer: u32, now: Nanos) {
            self.0.push((timer, now));
        }
    }

    #[test]
    fn a_deadline_is_the_first_instant_of_its_tick() {
        for tick in [0, 1, 2, 1_193_181, 1_193_182, 1_000_000_007] {
            let at = deadline(tick, 1_193_182);
            assert_eq!(ticks(at, 1_193_182), tick);
            assert!(at == 0 || ticks(at - 1, 1_193_182) < tick);
        }
    }

    #[test]
    fn timers_fire_in_order_and_once() {
        let queue = TimerQueue::new(Clock::manual());
        let target = Arc::new(Mutex::new(Count(vec![])));
        let weak: Weak<dyn TimerHandler> = Arc::downgrade(&(target.clone() as Arc<dyn TimerHandler>));
        let a = queue.create(weak.clone(), 1);
        let b = queue.create(weak, 2);
        a.arm(20);
        b.arm(10);
        a.arm(30);
        queue.clock().advance(25);
        assert_eq!(queue.fire_due(), Some(30));
        queue.clock().advance(5);
        assert_eq!(queue.fire_due(), None);
        assert_eq!(target.lock().0, [(2, 25), (1, 30)]);
    }

    #[test]
    fn a_counters_clock_leaves_out_what_the_counter_does_while_it_stands() {
        let counter = Arc::new(std::sync::atomic::AtomicU64::new(1000));
        let read = counter.clone();
        let clock = Clock::from_counter(2_000_000_000, Box::new(move || read.load(Ordering::SeqCst)));
        assert_eq!((clock.now(), clock.anchor()), (0, None));
        clock.start();
        counter.fetch_add(500, Ordering::SeqCst);
        assert_eq!((clock.now(), clock.anchor()), (250, Some(Anchor { counter: 1000, time: 0 })));
        clock.stop();
        counter.fetch_add(10_000, Ordering::SeqCst);
        assert_eq!(clock.now(), 250);
        clock.start();
        assert_eq!(clock.anchor(), Some(Anchor { counter: 11_500, time: 250 }));
    }

    #[test]
    fn a_stopped_clock_stands_still() {
        let clock = Clock::new();
        clock.start();
        clock.stop();
        let then = clock.now();
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(clock.now(), then);
    }
}
