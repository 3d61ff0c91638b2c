//! What the examples and studies have in common as programs: progress on stderr, a result on
//! stdout, an exit status.
use indicatif::ProgressBar;
use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

/// Says on stderr what is going on.
pub struct Progress(pub ProgressBar);

impl Progress {
    #[expect(clippy::new_without_default, reason = "it starts to spin")]
    pub fn new() -> Self {
        let bar = ProgressBar::new_spinner();
        bar.enable_steady_tick(Duration::from_millis(200));
        Self(bar)
    }

    pub fn say(&self, what: impl Into<String>) {
        let what = what.into();
        if self.0.is_hidden() {
            eprintln!("{what} ...");
        } else {
            self.0.set_message(what);
        }
    }

    /// Something that stays on the screen.
    pub fn note(&self, what: &str) {
        self.0.suspend(|| eprintln!("{what}"));
    }
}

/// What a program found: text for stdout, and whether every check passed.
pub struct Found {
    pub text: String,
    pub ok: bool,
}

/// Runs a program and prints what it found. Exits with 1 where a check failed, or with a message
/// where it could not run.
pub fn run(name: &str, work: impl FnOnce(&Progress) -> Result<Found, String>) -> ExitCode {
    let progress = Progress::new();
    let found = work(&progress);
    progress.0.finish_and_clear();
    match found {
        Ok(Found { text, ok }) => {
            // Whoever read stdout may be gone.
            let printed = std::io::stdout().write_all(text.as_bytes()).is_ok();
            if ok && printed { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(e) => {
            eprintln!("{name}: {e}");
            ExitCode::FAILURE
        }
    }
}

/// A report as text for people, or as one line of JSON.
pub fn text_of<T: serde::Serialize>(
    report: &T,
    json: bool,
    tables: impl FnOnce(&T) -> String,
) -> Result<String, String> {
    if !json {
        return Ok(tables(report));
    }
    serde_json::to_string(report).map(|json| json + "\n").map_err(|e| e.to_string())
}

/// Draws a picture where one is asked for.
pub fn save(
    svg: Option<&std::path::Path>,
    draw: impl FnOnce() -> Result<String, String>,
) -> Result<(), String> {
    let Some(path) = svg else { return Ok(()) };
    let text = draw().map_err(|e| format!("--svg: {e}"))?;
    std::fs::write(path, text).map_err(|e| format!("--svg {}: {e}", path.display()))
}

/// Sums the times of dispatches of one name, in the order in which the names come.
pub fn sum_up(times: impl IntoIterator<Item = (String, f64)>) -> Vec<(String, f64)> {
    let mut sums: Vec<(String, f64)> = vec![];
    for (name, ms) in times {
        match sums.iter_mut().find(|(n, _)| *n == name) {
            Some((_, sum)) => *sum += ms,
            None => sums.push((name, ms)),
        }
    }
    sums
}
