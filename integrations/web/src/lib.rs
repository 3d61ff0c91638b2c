//! What the page calls, from a worker: opening a device, checking the kernels, measuring them, and routing one
//! block of tokens for a picture. What it hands over is JSON, but for the picture's arrays.
mod check;
mod measure;
mod see;

pub use measure::{measure, report_page, stop};

use check::Checks;
use see::See;
use serde::Serialize;
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use wasm_bindgen::prelude::*;
use wgmoe::{Context, Gpu, wgpu};

/// What an error is told as.
fn say(e: impl std::fmt::Display) -> JsError {
    JsError::new(&e.to_string())
}

fn json(value: &impl Serialize) -> Result<String, JsError> {
    serde_json::to_string(value).map_err(say)
}

/// A device, and what the browser said was wrong with what was asked of it.
#[derive(Clone)]
struct Device {
    gpu: Gpu,
    ctx: Context,
    errors: Arc<Mutex<Vec<String>>>,
}

impl Device {
    async fn open() -> Result<Self, wgmoe::Error> {
        let gpu = Gpu::open(None).await?;
        let errors = Arc::new(Mutex::new(vec![]));
        let kept = errors.clone();
        gpu.device.on_uncaptured_error(Arc::new(move |e: wgpu::Error| {
            kept.lock().unwrap_or_else(PoisonError::into_inner).push(e.to_string());
        }));
        let told = errors.clone();
        gpu.device.set_device_lost_callback(move |reason, message| {
            let lost = format!("the device was lost ({reason:?}): {message}");
            told.lock().unwrap_or_else(PoisonError::into_inner).push(lost);
        });
        let ctx = Context::new(&gpu.device)?;
        Ok(Self { gpu, ctx, errors })
    }

    /// The first error since the last call.
    fn error(&self) -> Option<String> {
        let mut errors = self.errors.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *errors).into_iter().next()
    }
}

/// What is said of a device.
#[derive(Serialize)]
struct About {
    name: String,
    software: bool,
    variant: String,
    features: Vec<&'static str>,
    limits: Vec<(&'static str, u64)>,
}

/// The kernels on a device, or the CPU twins where there is none.
#[wasm_bindgen]
pub struct Session {
    device: Option<Device>,
    checks: Checks,
    see: Rc<RefCell<See>>,
}

#[wasm_bindgen]
impl Session {
    /// Opens the browser's device, or none.
    ///
    /// # Errors
    ///
    /// Why there is no device.
    pub async fn open(with_device: bool) -> Result<Session, JsError> {
        console_error_panic_hook::set_once();
        let device = if with_device { Some(Device::open().await.map_err(say)?) } else { None };
        Ok(Self { device, checks: Checks::new(), see: Rc::default() })
    }

    /// The device in JSON, `null` without one.
    ///
    /// # Errors
    ///
    /// What the serializer says.
    pub fn about(&self) -> Result<String, JsError> {
        json(&self.device.as_ref().map(|Device { gpu, ctx, .. }| {
            let (limits, features) = (ctx.limits(), gpu.device.features());
            let wanted = [
                ("subgroups", wgpu::Features::SUBGROUP),
                ("timestamps", wgpu::Features::TIMESTAMP_QUERY),
            ];
            About {
                name: gpu.info.name.clone(),
                software: gpu.info.device_type == wgpu::DeviceType::Cpu,
                variant: format!("{:?}", ctx.variant().target),
                features: wanted
                    .into_iter()
                    .filter_map(|(name, f)| features.contains(f).then_some(name))
                    .collect(),
                limits: vec![
                    ("largest binding", limits.max_storage_buffer_binding_size),
                    ("largest buffer", limits.max_buffer_size),
                    ("bindings", limits.max_storage_buffers_per_shader_stage.into()),
                    ("lanes", limits.max_compute_invocations_per_workgroup.into()),
                    ("workgroup memory", limits.max_compute_workgroup_storage_size.into()),
                ],
            }
        }))
    }

    /// The names of the checks after those of recorded layers, a list in JSON.
    ///
    /// # Errors
    ///
    /// What the serializer says.
    pub fn checks(&self) -> Result<String, JsError> {
        json(&self.checks.names(self.device.is_some()))
    }

    /// Compares a recorded layer, a file of bytes; the result in JSON.
    ///
    /// # Errors
    ///
    /// A file that holds no layer.
    pub async fn check_recorded(&self, name: String, bytes: Vec<u8>) -> Result<String, JsError> {
        json(&check::recorded(self.device.as_ref(), &name, &bytes).await.map_err(say)?)
    }

    /// Makes check number `i`; the result in JSON.
    ///
    /// # Errors
    ///
    /// What the serializer says. A check that fails is a result.
    pub async fn check(&self, i: usize) -> Result<String, JsError> {
        json(&self.checks.run(self.device.as_ref(), i).await)
    }

    /// Routes a block by settings in JSON.
    ///
    /// # Errors
    ///
    /// Settings that make no sense, or what the device refuses.
    pub async fn route(&self, settings: String) -> Result<see::Picture, JsError> {
        let settings = serde_json::from_str(&settings).map_err(say)?;
        // Kept only while nothing waits: two pictures may be on their way.
        let block = self.see.borrow_mut().block(&settings, self.device.as_ref()).map_err(say)?;
        block.route(&settings, self.device.as_ref()).await.map_err(say)
    }
}
