//! Progress of an example, on stderr.
use indicatif::ProgressBar;
use std::time::Duration;

/// Says on stderr what is going on.
pub(crate) struct Progress(pub(crate) ProgressBar);

impl Progress {
    pub(crate) fn new() -> Self {
        let bar = ProgressBar::new_spinner();
        bar.enable_steady_tick(Duration::from_millis(200));
        Self(bar)
    }

    pub(crate) fn say(&self, what: impl Into<String>) {
        let what = what.into();
        if self.0.is_hidden() {
            eprintln!("{what} ...");
        } else {
            self.0.set_message(what);
        }
    }

    /// Something that stays on the screen.
    pub(crate) fn note(&self, what: &str) {
        self.0.suspend(|| eprintln!("{what}"));
    }
}
