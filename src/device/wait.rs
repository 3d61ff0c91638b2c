//! Waiting for the device, by blocking or by `await`.
use super::guard::alive;
use crate::{Error, Result};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Poll, Waker};

/// How to wait for the device.
#[derive(Clone, Copy)]
pub(crate) enum Wait {
    /// By polling it.
    Poll,
    /// Somebody else polls it.
    Await,
}

impl Wait {
    /// By polling, but in a browser: nothing may block there, and callbacks come by themselves.
    pub(crate) const HERE: Self =
        if cfg!(target_family = "wasm") { Self::Await } else { Self::Poll };

    /// The value of a callback of wgpu's that comes when a submission has run; all that was submitted where none is named.
    pub(crate) async fn until<T>(
        self,
        device: &wgpu::Device,
        submission_index: Option<wgpu::SubmissionIndex>,
        callback: impl Future<Output = T>,
    ) -> Result<T> {
        if let Self::Poll = self {
            let poll = device.poll(wgpu::PollType::Wait { submission_index, timeout: None });
            poll.map_err(|e| Error::Device(e.to_string()))?;
            alive(device)?; // a lost device's callbacks may never come
        }
        Ok(callback.await)
    }
}

/// Fails in a browser: a thread that waits there keeps the answer from coming, and there is no clock of the system's.
pub(crate) fn may_block() -> Result<()> {
    if cfg!(target_family = "wasm") {
        let told = "in a browser nothing may block: `await` the function whose name ends in `_async`, where there is one";
        return Err(Error::Device(told.into()));
    }
    Ok(())
}

/// What waits by [`Wait::Poll`], to its end; an error in a browser.
pub(crate) fn block_on<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    may_block()?;
    pollster::block_on(work)
}

/// A submission, and what comes when it has run.
pub(crate) struct Submitted {
    submission: wgpu::SubmissionIndex,
    done: std::pin::Pin<Box<dyn Future<Output = ()> + Send + Sync>>,
}

impl Submitted {
    /// Of the last submission to a queue.
    pub(crate) fn new(queue: &wgpu::Queue, submission: wgpu::SubmissionIndex) -> Self {
        let (done, future) = signal();
        queue.on_submitted_work_done(move || done(()));
        Self { submission, done: Box::pin(future) }
    }

    /// Waits until it has run; to be called once more where the caller gives up halfway.
    pub(crate) async fn finish(&mut self, device: &wgpu::Device, wait: Wait) -> Result<()> {
        wait.until(device, Some(self.submission.clone()), self.done.as_mut()).await
    }
}

/// A callback, and the future of what it is called with.
pub(crate) fn signal<T: Send + 'static>()
-> (impl FnOnce(T) + Send + 'static, impl Future<Output = T> + Send + Sync + 'static) {
    let state = Arc::new(Mutex::new((None, None::<Waker>)));
    let shared = state.clone();
    let callback = move |value| {
        let mut state = shared.lock().unwrap_or_else(PoisonError::into_inner);
        state.0 = Some(value);
        if let Some(waker) = state.1.take() {
            waker.wake();
        }
    };
    let future = std::future::poll_fn(move |context| {
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        match state.0.take() {
            Some(value) => Poll::Ready(value),
            None => {
                state.1 = Some(context.waker().clone());
                Poll::Pending
            }
        }
    });
    (callback, future)
}
