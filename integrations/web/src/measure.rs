//! The quick cases of `wgmoe-bench`, watched by the page.
use crate::say;
use js_sys::Function;
use std::sync::atomic::{AtomicBool, Ordering};
use wasm_bindgen::prelude::*;
use wgmoe_bench::{Plan, Report, Watch, adapters, page, run};

/// Bytes of a layer's weights: what a browser gives on small devices too.
const MEMORY: u64 = 512 << 20;

/// Ends the run that is under way, at its next sample.
static STOP: AtomicBool = AtomicBool::new(false);

/// Tells the page: `tell(kind, text or number)`.
struct Told(Function);

impl Told {
    fn tell(&self, kind: &str, value: impl Into<JsValue>) {
        // The page's own errors are its own.
        let _ = self.0.call2(&JsValue::NULL, &kind.into(), &value.into());
    }
}

impl Watch for Told {
    fn begin(&mut self, cases: usize) {
        self.tell("cases", cases as u32);
    }

    fn say(&mut self, what: &str, seconds_left: u64) {
        self.tell("left", seconds_left as u32);
        self.tell("say", what);
    }

    fn note(&mut self, what: &str) {
        self.tell("note", what);
    }

    fn advance(&mut self) {
        self.tell("case", 1);
    }

    fn end(&mut self) {}

    fn save(&mut self, report: &Report) -> Result<(), String> {
        self.tell("report", report.text()?);
        Ok(())
    }
}

/// Measures for so many seconds at most, on a device of its own. `browser` is what the file calls the driver;
/// `tell` hears how it goes, and the file whenever it has grown. Gives the file.
///
/// # Errors
///
/// No device.
#[wasm_bindgen]
pub async fn measure(seconds: f64, browser: String, tell: Function) -> Result<String, JsError> {
    STOP.store(false, Ordering::Relaxed);
    // A browser's adapter makes one device.
    let adapters = adapters().await;
    if adapters.is_empty() {
        return Err(say("the browser gave no adapter"));
    }
    let mut plan = Plan::new(seconds, &STOP);
    plan.quick = true;
    plan.memory = Some(MEMORY);
    plan.driver = Some(browser);
    plan.commit = option_env!("WGMOE_COMMIT").map(String::from);
    let report = run(&adapters, &plan, &mut Told(tell)).await.map_err(say)?;
    report.text().map_err(say)
}

/// Ends the measuring; what was measured is kept.
#[wasm_bindgen]
pub fn stop() {
    STOP.store(true, Ordering::Relaxed);
}

/// The page that `wgmoe-bench report` makes of a file.
///
/// # Errors
///
/// What is wrong with the file.
#[wasm_bindgen]
pub fn report_page(text: &str) -> Result<String, JsError> {
    Report::parse(text).map(|report| page(&[report])).map_err(say)
}
