//! A run in a terminal: a bar on stderr, the results in a file, an end at Ctrl-C.
use indicatif::{ProgressBar, ProgressStyle};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use wgmoe_bench::{Report, Watch};

pub(crate) struct Terminal<'a> {
    bar: ProgressBar,
    out: &'a Path,
}

impl<'a> Terminal<'a> {
    pub(crate) fn new(out: &'a Path) -> Self {
        Self { bar: bar(), out }
    }
}

fn bar() -> ProgressBar {
    let bar = ProgressBar::new(0);
    let style = ProgressStyle::with_template("{bar:24} {pos}/{len} {msg}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar
}

impl Watch for Terminal<'_> {
    fn begin(&mut self, cases: usize) {
        self.bar.set_length(cases as u64);
    }

    fn say(&mut self, what: &str, seconds_left: u64) {
        if self.bar.is_hidden() {
            eprintln!("{what} ...");
        } else {
            self.bar.enable_steady_tick(Duration::from_millis(500));
            let (minutes, seconds) = (seconds_left / 60, seconds_left % 60);
            self.bar.set_message(format!("at most {minutes}:{seconds:02} left, {what}"));
        }
    }

    fn note(&mut self, what: &str) {
        self.bar.suspend(|| eprintln!("{what}"));
    }

    fn advance(&mut self) {
        self.bar.inc(1);
    }

    fn end(&mut self) {
        self.bar.finish_and_clear();
        self.bar = bar();
    }

    fn save(&mut self, report: &Report) -> Result<(), String> {
        report.write(self.out)
    }
}

/// Stops a run at Ctrl-C, at once at the second one.
pub(crate) fn stop_at_ctrl_c() -> Result<&'static AtomicBool, String> {
    static STOP: AtomicBool = AtomicBool::new(false);
    ctrlc::set_handler(|| {
        if STOP.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
        eprintln!("\nstopping; what was measured is kept (Ctrl-C again: at once)");
    })
    .map_err(|e| e.to_string())?;
    Ok(&STOP)
}
