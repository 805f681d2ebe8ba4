//! The state of a long operation, and how IProgress shows it. The service and VM processes share this.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use uuid::Uuid;
use vbox_types::ResultCode;

use crate::error::{ApiError, ApiResult};
use crate::idl::{IProgress, IVirtualBoxErrorInfo};
use crate::server::{CallTable, ReadTable};
use crate::types::ObjRef;

/// A long operation.
pub struct Progress {
    pub id: Uuid,
    pub description: String,
    operation_count: u32,
    cancelable: bool,
    started: Instant,
    inner: Mutex<Inner>,
    changed: Condvar,
}

struct Inner {
    operation: u32,
    operation_description: String,
    operation_percent: u32,
    canceled: bool,
    /// Set once: how the operation ended.
    outcome: Option<(ApiResult<()>, Instant)>,
}

impl Progress {
    /// An operation that consists of `operation_count` (at least one) parts of equal weight.
    pub fn new(description: impl Into<String>, operation_count: u32, cancelable: bool) -> Self {
        let description = description.into();
        Self {
            id: Uuid::new_v4(),
            operation_count: operation_count.max(1),
            cancelable,
            started: Instant::now(),
            inner: Mutex::new(Inner {
                operation: 0,
                operation_description: description.clone(),
                operation_percent: 0,
                canceled: false,
                outcome: None,
            }),
            changed: Condvar::new(),
            description,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells how far the current part has come, and what it does.
    pub fn set(&self, percent: u32, operation: &str) {
        let mut inner = self.lock();
        // Progress never runs backwards, and 100 is for the end.
        inner.operation_percent = inner.operation_percent.max(percent.min(99));
        if !operation.is_empty() && inner.operation_description != operation {
            inner.operation_description = operation.to_owned();
        }
        self.changed.notify_all();
    }

    /// Begins the next part.
    pub fn next_operation(&self, description: &str) {
        let mut inner = self.lock();
        inner.operation = (inner.operation + 1).min(self.operation_count - 1);
        inner.operation_percent = 0;
        inner.operation_description = description.to_owned();
        self.changed.notify_all();
    }

    /// Ends the operation. Only the first call counts.
    pub fn complete(&self, outcome: ApiResult<()>) {
        let mut inner = self.lock();
        if inner.outcome.is_none() {
            if outcome.is_ok() {
                inner.operation = self.operation_count - 1;
                inner.operation_percent = 100;
            }
            inner.outcome = Some((outcome, Instant::now()));
            self.changed.notify_all();
        }
    }

    /// Whether someone has asked for the operation to be cancelled.
    pub fn canceled(&self) -> bool {
        self.lock().canceled
    }

    /// How the operation ended, and when.
    pub fn outcome(&self) -> Option<(ApiResult<()>, Instant)> {
        self.lock().outcome.clone()
    }

    /// Waits for the end, at most for `limit`. Whether the end has come.
    pub fn wait(&self, limit: Option<Duration>) -> bool {
        let deadline = limit.map(|l| Instant::now() + l);
        let mut inner = self.lock();
        while inner.outcome.is_none() {
            let Some(deadline) = deadline else {
                inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            inner = self.changed.wait_timeout(inner, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    fn percent(&self) -> u32 {
        let inner = self.lock();
        if inner.outcome.is_some() {
            return 100;
        }
        ((inner.operation * 100 + inner.operation_percent) / self.operation_count).min(99)
    }

    fn time_remaining(&self) -> i32 {
        let percent = self.percent();
        if percent == 0 {
            return -1;
        }
        let spent = self.started.elapsed().as_secs();
        i32::try_from(spent * u64::from(100 - percent) / u64::from(percent)).unwrap_or(i32::MAX)
    }

    fn completed<T>(&self, read: impl FnOnce(&ApiResult<()>) -> T) -> ApiResult<T> {
        match &self.lock().outcome {
            Some((outcome, _)) => Ok(read(outcome)),
            None => Err(ApiError::fail("Result code is not available, operation is still in progress")),
        }
    }
}

/// A progress with the path of its object, which its error object's path extends.
pub struct ProgressObject {
    pub progress: Arc<Progress>,
    pub path: String,
}

/// How IProgress and its IVirtualBoxErrorInfo are read.
pub fn reads() -> ReadTable<ProgressObject> {
    let mut t = ReadTable::<ProgressObject>::default();
    t.add(IProgress::Id, |o| o.progress.id.to_string())
        .add(IProgress::Description, |o| o.progress.description.clone())
        .add(IProgress::Cancelable, |o| o.progress.cancelable)
        .add(IProgress::Percent, |o| o.progress.percent())
        .add(IProgress::TimeRemaining, |o| o.progress.time_remaining())
        .add(IProgress::Completed, |o| o.progress.outcome().is_some())
        .add(IProgress::Canceled, |o| o.progress.canceled())
        .add_fallible(IProgress::ResultCode, |o| {
            o.progress.completed(|r| r.as_ref().err().map_or(0, |e| e.code as i32))
        })
        .add(IProgress::ErrorInfo, |o| match o.progress.outcome() {
            Some((Err(_), _)) => ObjRef::new(format!("{}/ErrorInfo", o.path)),
            _ => ObjRef::null(),
        })
        .add(IProgress::OperationCount, |o| o.progress.operation_count)
        .add(IProgress::Operation, |o| o.progress.lock().operation)
        .add(IProgress::OperationDescription, |o| o.progress.lock().operation_description.clone())
        .add(IProgress::OperationPercent, |o| o.progress.lock().operation_percent);
    let error = |o: &ProgressObject| match o.progress.outcome() {
        Some((Err(error), _)) => Ok(error),
        _ => Err(ApiError::fail("The operation has no error")),
    };
    t.add_fallible(IVirtualBoxErrorInfo::ResultCode, move |o| Ok(error(o)?.code as i32))
        .add_fallible(IVirtualBoxErrorInfo::InterfaceID, move |o| Ok(error(o)?.interface))
        .add_fallible(IVirtualBoxErrorInfo::Component, move |o| Ok(error(o)?.component))
        .add_fallible(IVirtualBoxErrorInfo::Text, move |o| Ok(error(o)?.text))
        .add(IVirtualBoxErrorInfo::Next, |_| ObjRef::null());
    t
}

/// How IProgress is called. `WaitForCompletion` blocks.
pub fn calls() -> CallTable<ProgressObject> {
    let mut t = CallTable::default();
    t.add(IProgress::WaitForCompletion, |o: &ProgressObject, (timeout,)| {
        o.progress.wait(u64::try_from(timeout).ok().map(Duration::from_millis));
        Ok(())
    });
    t.add(IProgress::Cancel, |o: &ProgressObject, ()| {
        if !o.progress.cancelable {
            return Err(ApiError::new(ResultCode::InvalidObjectState, "Operation cannot be canceled"));
        }
        o.progress.lock().canceled = true;
        o.progress.changed.notify_all();
        Ok(())
    });
    t
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_ends_with_the_operation_or_with_the_time() {
        let progress = Arc::new(Progress::new("x", 2, false));
        assert!(!progress.wait(Some(Duration::from_millis(1))));
        let other = progress.clone();
        let thread = std::thread::spawn(move || other.wait(None));
        progress.complete(Err(ApiError::fail("broken")));
        progress.complete(Ok(()));
        assert!(thread.join().unwrap());
        assert_eq!(progress.outcome().unwrap().0, Err(ApiError::fail("broken")));
    }

    #[test]
    fn percent_counts_the_parts_and_reaches_100_at_the_end_only() {
        let progress = Progress::new("x", 2, false);
        progress.set(100, "");
        assert_eq!(progress.percent(), 49);
        progress.next_operation("second");
        progress.set(50, "");
        assert_eq!(progress.percent(), 75);
        progress.complete(Ok(()));
        assert_eq!(progress.percent(), 100);
    }
}
