//! What the page calls, from a worker: opening a device, checking the kernels, measuring them, and routing one
//! block of tokens for a picture. What it hands over is JSON, but for the picture's arrays.
mod check;
mod device;
mod measure;
mod rules;
mod see;

pub use measure::{measure, report_page, stop};

use check::Checks;
use device::Device;
use js_sys::Promise;
use see::See;
use serde::Serialize;
use std::cell::RefCell;
use std::rc::Rc;
use wasm_bindgen::prelude::*;
use wasm_bindgen_futures::future_to_promise;

/// What an error is told as.
fn say(e: impl std::fmt::Display) -> JsError {
    JsError::new(&e.to_string())
}

fn json(value: &impl Serialize) -> Result<String, JsError> {
    serde_json::to_string(value).map_err(say)
}

/// The rules that the picture can show, a list in JSON.
///
/// # Errors
///
/// What the serializer says.
#[wasm_bindgen]
pub fn rules() -> Result<String, JsError> {
    json(&rules::Rule::ALL.map(rules::Rule::told))
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
        json(&self.device.as_ref().map(Device::about))
    }

    /// Comes when the device is lost, with the reason.
    pub fn lost(&self) -> Promise {
        let device = self.device.clone();
        future_to_promise(async move {
            match device {
                Some(device) => Ok(device.lost().await.into()),
                None => std::future::pending().await,
            }
        })
    }

    /// Whether the device is lost.
    pub fn is_lost(&self) -> bool {
        self.device.as_ref().is_some_and(|device| device.is_lost().is_some())
    }

    /// What the browser reported, since the last call, that came of no work of this session's.
    pub fn stray(&self) -> Vec<String> {
        self.device.as_ref().map(Device::stray).unwrap_or_default()
    }

    /// The names of the checks after those of recorded layers, a list in JSON.
    ///
    /// # Errors
    ///
    /// What the serializer says.
    pub fn checks(&self) -> Result<String, JsError> {
        json(&self.checks.names(self.device.is_some()))
    }

    /// Compares a recorded layer, a file of bytes; the result in JSON. One work at a time is the device's: this,
    /// [`Session::check`] or [`Session::route`].
    ///
    /// # Errors
    ///
    /// A file that holds no layer, or a device that is lost.
    pub async fn check_recorded(&self, name: String, bytes: Vec<u8>) -> Result<String, JsError> {
        self.found(check::recorded(self.device.as_ref(), &name, &bytes).await)
    }

    /// Makes check number `i`; the result in JSON.
    ///
    /// # Errors
    ///
    /// A device that is lost. A check that fails is a result.
    pub async fn check(&self, i: usize) -> Result<String, JsError> {
        self.found(self.checks.run(self.device.as_ref(), i).await)
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

impl Session {
    /// What a check found. That the device is lost says nothing of the check.
    fn found(&self, result: Result<String, String>) -> Result<String, JsError> {
        match result {
            Err(e) if self.is_lost() => Err(say(e)),
            result => json(&check::Found::from(result)),
        }
    }
}
