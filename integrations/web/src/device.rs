//! The browser's device: what it reports is told of the work that it came of, and its loss of the device.
use serde::Serialize;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};
use wgmoe::{Context, Gpu, wgpu};

/// A device, and what became of it.
#[derive(Clone)]
pub(crate) struct Device {
    pub(crate) gpu: Gpu,
    pub(crate) ctx: Context,
    fate: Arc<Mutex<Fate>>,
}

/// Who waits for the device's loss.
#[derive(Clone, Copy)]
enum Who {
    Page,
    Work,
}

#[derive(Default)]
struct Fate {
    /// Why it is lost; it stays so.
    lost: Option<String>,
    /// Who waits for that: the page, and the work under way.
    waiting: [Option<Waker>; 2],
    /// Errors that came of nobody's work.
    stray: Vec<String>,
}

fn locked(fate: &Mutex<Fate>) -> MutexGuard<'_, Fate> {
    fate.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What is said of a device.
#[derive(Serialize)]
pub(crate) struct About {
    name: String,
    software: bool,
    variant: String,
    timestamps: bool,
    limits: Vec<(&'static str, u64)>,
}

impl Device {
    pub(crate) async fn open() -> Result<Self, wgmoe::Error> {
        let gpu = Gpu::open(None).await?;
        let fate = Arc::new(Mutex::new(Fate::default()));
        let of_errors = fate.clone();
        gpu.device.on_uncaptured_error(Arc::new(move |e: wgpu::Error| {
            locked(&of_errors).stray.push(e.to_string());
        }));
        let of_loss = fate.clone();
        gpu.device.set_device_lost_callback(move |reason, message| {
            let mut fate = locked(&of_loss);
            let why = if message.is_empty() { format!("{reason:?}") } else { message };
            fate.lost = Some(why);
            let waiting = std::mem::take(&mut fate.waiting);
            drop(fate);
            waiting.into_iter().flatten().for_each(Waker::wake);
        });
        let ctx = Context::new(&gpu.device)?;
        Ok(Self { gpu, ctx, fate })
    }

    pub(crate) fn about(&self) -> About {
        let (limits, features) = (self.ctx.limits(), self.gpu.device.features());
        About {
            name: self.gpu.info.name.clone(),
            software: self.gpu.info.device_type == wgpu::DeviceType::Cpu,
            variant: format!("{:?}", self.ctx.variant().target),
            timestamps: features.contains(wgpu::Features::TIMESTAMP_QUERY),
            limits: vec![
                ("largest binding", limits.max_storage_buffer_binding_size),
                ("largest buffer", limits.max_buffer_size),
                ("bindings", limits.max_storage_buffers_per_shader_stage.into()),
                ("lanes", limits.max_compute_invocations_per_workgroup.into()),
                ("workgroup memory", limits.max_compute_workgroup_storage_size.into()),
            ],
        }
    }

    /// Why it is lost, where it is.
    pub(crate) fn is_lost(&self) -> Option<String> {
        locked(&self.fate).lost.clone()
    }

    /// Comes when it is lost, with the reason. For the page, once.
    pub(crate) fn lost(&self) -> impl Future<Output = String> + 'static {
        self.lost_for(Who::Page)
    }

    fn lost_for(&self, who: Who) -> impl Future<Output = String> + 'static {
        let fate = self.fate.clone();
        std::future::poll_fn(move |context| {
            let mut fate = locked(&fate);
            match &fate.lost {
                Some(why) => Poll::Ready(why.clone()),
                None => {
                    fate.waiting[who as usize] = Some(context.waker().clone());
                    Poll::Pending
                }
            }
        })
    }

    /// Errors since the last call that came of no [`Device::watched`] work.
    pub(crate) fn stray(&self) -> Vec<String> {
        std::mem::take(&mut locked(&self.fate).stray)
    }

    /// Does some work. What the browser reports of it is its error, and so is the loss of the device, after which answers
    /// may never come. One work at a time: error scopes are the device's.
    pub(crate) async fn watched<T>(
        &self,
        work: impl Future<Output = Result<T, String>>,
    ) -> Result<T, String> {
        use wgpu::ErrorFilter::{Internal, OutOfMemory, Validation};
        let device = &self.gpu.device;
        let [memory, internal, validation] =
            [OutOfMemory, Internal, Validation].map(|filter| device.push_error_scope(filter));
        let done = self.unless_lost(work).await?;
        // All three end now, before anything else of the device's is called.
        let scopes = [validation.pop(), internal.pop(), memory.pop()];
        for scope in scopes {
            if let Some(error) = self.unless_lost(scope).await? {
                return Err(error.to_string());
            }
        }
        done
    }

    /// What `work` gives, or an error when the device is lost.
    async fn unless_lost<T>(&self, work: impl Future<Output = T>) -> Result<T, String> {
        let (mut work, mut lost) = (pin!(work), pin!(self.lost_for(Who::Work)));
        std::future::poll_fn(|context| {
            // Lost first: what a lost device gives is nothing.
            if let Poll::Ready(why) = lost.as_mut().poll(context) {
                return Poll::Ready(Err(format!("the device was lost: {why}")));
            }
            work.as_mut().poll(context).map(Ok)
        })
        .await
    }
}
