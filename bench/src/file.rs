//! The file of results: what it holds (docs/bench-format.md), how it is written and read.
//!
//! Long: the whole of one file format.
use serde::{Deserialize, Serialize};
use std::io::Write;
use std::path::Path;

/// Says what the file is.
const FORMAT: &str = "wgmoe-bench";
/// Grows when a reader of the version before would misread the file.
pub(crate) const VERSION: u64 = 1;
/// Files past this are refused unread; a full run of one adapter makes less than 1 MB.
const MOST_BYTES: u64 = 64 << 20;

/// A run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    format: String,
    version: u64,
    pub(crate) program: Program,
    pub(crate) os: String,
    pub(crate) arch: String,
    /// Seconds since 1970, when the run began.
    pub(crate) began_unix_s: u64,
    pub(crate) quick: bool,
    /// Whether the run was stopped before its end.
    pub(crate) interrupted: bool,
    pub(crate) adapters: Vec<Adapter>,
}

/// What measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Program {
    pub(crate) version: String,
    /// Of the source that the program was built from, where that is known.
    pub(crate) commit: Option<String>,
}

/// An adapter and what was measured on it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Adapter {
    pub(crate) name: String,
    /// PCI vendor, or the driver's own number.
    pub(crate) vendor: u32,
    pub(crate) backend: String,
    /// `DiscreteGpu`, `IntegratedGpu`, `VirtualGpu`, `Cpu` or `Other`.
    pub(crate) kind: String,
    pub(crate) driver: String,
    /// Of the features that matter here, those that the device was made with.
    pub(crate) features: Vec<String>,
    /// What became of matrix units that were asked for; empty where they were not.
    #[serde(default)]
    pub(crate) matrix_units: String,
    pub(crate) max_binding_bytes: u64,
    pub(crate) max_buffer_bytes: u64,
    /// Why the adapter could not be measured, or not to the end.
    pub(crate) failure: Option<String>,
    pub(crate) ceilings: Option<Ceilings>,
    pub(crate) cases: Vec<Case>,
}

/// What the device can do at best. None where it could not be measured, which a note explains.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Ceilings {
    /// Bytes read and written in copying, 10^9 a second.
    pub(crate) copy_gb_s: Option<f64>,
    /// Bytes read, 10^9 a second.
    pub(crate) read_gb_s: Option<f64>,
    /// f32 multiply-adds in registers, two operations each, 10^9 a second.
    pub(crate) multiply_add_gflop_s: Option<f64>,
    /// Products of squares on the matrix units that the kernels used, two operations a multiply-add,
    /// 10^9 a second; none where they used none.
    #[serde(default)]
    pub(crate) matrix_gflop_s: Option<f64>,
    /// One more dispatch that waits for the one before.
    pub(crate) dispatch_us: Option<f64>,
    /// One dispatch, encoded, submitted and waited for.
    pub(crate) submit_us: Option<f64>,
    pub(crate) notes: Vec<String>,
}

/// One case: what was to be measured, and what came of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Case {
    #[serde(flatten)]
    pub(crate) id: CaseId,
    /// Why fewer experts than the model has; none: all of them.
    pub(crate) reduced: Option<String>,
    pub(crate) outcome: Outcome,
}

/// What makes two cases of two devices the same.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct CaseId {
    pub(crate) model: String,
    /// Routed experts in use.
    pub(crate) experts: u32,
    /// Routed experts of the model.
    pub(crate) experts_of_model: u32,
    pub(crate) load: Load,
    pub(crate) tokens: u32,
    pub(crate) rule: String,
    /// Whether it is the rule that the model was trained with.
    pub(crate) own_rule: bool,
    pub(crate) part: Part,
    /// Type the experts are stored as.
    pub(crate) weights: String,
}

/// What the tokens are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Load {
    /// One block of 32 tokens.
    Block,
    /// Eight or 64 blocks, decoded together.
    Batch,
    /// A prompt.
    Prefill,
}

/// What is timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Part {
    /// From logits to the choice.
    Routing,
    /// Gates and plan.
    Plan,
    /// Rows of the hidden states in the plan's order.
    Gather,
    /// The expert matmuls.
    Experts,
    /// The whole layer.
    Layer,
}

/// What came of a case.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "status", rename_all = "snake_case")]
pub(crate) enum Outcome {
    Measured(Measured),
    /// The result was wrong, or the device refused the work. Never timed.
    Failed {
        reason: String,
    },
    Skipped {
        reason: String,
    },
}

/// A case's times and its work. Means are over the inputs that took turns.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Measured {
    /// On the host's clock: encoding, submitting and waiting, shared by the repeats of a sample.
    pub(crate) wall: Times,
    /// Between GPU timestamps around the same work.
    pub(crate) gpu: Option<Times>,
    /// Why there are no GPU times.
    pub(crate) gpu_dropped: Option<String>,
    /// How often the work is recorded in one sample.
    pub(crate) repeats: u32,
    /// Inputs, with buffers of their own, that took turns.
    pub(crate) inputs: u32,
    /// Copies of the weights that took turns.
    pub(crate) weight_copies: u32,
    /// Whether times had settled before the first sample that counts.
    pub(crate) settled: bool,
    pub(crate) work: Work,
    /// What bounds the case, the least time by that ceiling, and that over the median (of the
    /// GPU's times where there are any).
    pub(crate) bound: Option<Bound>,
    /// How it was compared with the CPU twin.
    pub(crate) check: String,
}

/// Times of one run of a case, in milliseconds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Times {
    pub(crate) median_ms: f64,
    /// Quartiles.
    pub(crate) q1_ms: f64,
    pub(crate) q3_ms: f64,
    pub(crate) least_ms: f64,
    /// Samples.
    pub(crate) count: u32,
}

/// What a case must do: its inputs read once and its outputs written once, whatever its kernels
/// pass between them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Work {
    pub(crate) bytes: f64,
    pub(crate) flops: f64,
    pub(crate) dispatches: f64,
    /// (token, expert) pairs, shared experts included.
    pub(crate) slots: f64,
    /// Distinct routed experts of a batch, and of a block of 32 tokens.
    pub(crate) experts_touched: f64,
    pub(crate) experts_per_block: f64,
}

/// The ceiling that a case meets first.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Bound {
    pub(crate) by: BoundBy,
    pub(crate) least_ms: f64,
    pub(crate) share: f64,
}

/// Which ceiling.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum BoundBy {
    Memory,
    Compute,
    Matrix,
    Dispatch,
}

impl Report {
    /// An empty report of a run that begins now.
    pub(crate) fn new(quick: bool, commit: Option<String>) -> Self {
        let since = web_time::SystemTime::now().duration_since(web_time::UNIX_EPOCH);
        Self {
            format: FORMAT.into(),
            version: VERSION,
            program: Program { version: env!("CARGO_PKG_VERSION").into(), commit },
            os: if cfg!(target_family = "wasm") { "browser" } else { std::env::consts::OS }.into(),
            arch: std::env::consts::ARCH.into(),
            began_unix_s: since.map_or(0, |d| d.as_secs()),
            quick,
            interrupted: false,
            adapters: vec![],
        }
    }

    /// Whether the run was stopped before its end.
    pub fn interrupted(&self) -> bool {
        self.interrupted
    }

    /// Whether something was measured, and nothing was wrong.
    pub fn is_good(&self) -> bool {
        let mut all = self.adapters.iter().flat_map(|a| &a.cases).map(|c| &c.outcome);
        let failed = all.clone().any(|o| matches!(o, Outcome::Failed { .. }));
        !failed && all.any(|o| o.measured().is_some())
    }

    /// A line for each adapter.
    pub fn summary(&self) -> String {
        let mut text = String::new();
        for adapter in &self.adapters {
            let count = |is: fn(&Outcome) -> bool| {
                adapter.cases.iter().filter(|case| is(&case.outcome)).count()
            };
            let failed = count(|o| matches!(o, Outcome::Failed { .. }));
            let skipped = count(|o| matches!(o, Outcome::Skipped { .. }));
            let measured = count(|o| o.measured().is_some());
            let why = adapter.failure.as_ref().map_or(String::new(), |why| format!("; {why}"));
            let Adapter { name, backend, .. } = adapter;
            text += &format!(
                "{name} ({backend}): {measured} cases measured, {failed} failed, {skipped} skipped{why}\n"
            );
        }
        text
    }

    /// The file's text.
    ///
    /// # Errors
    ///
    /// What the serializer says.
    pub fn text(&self) -> Result<String, String> {
        let text = serde_json::to_string_pretty(self).map_err(|e| e.to_string())?;
        Ok(text + "\n")
    }

    /// Writes the file whole or not at all: beside it first, then over it.
    ///
    /// # Errors
    ///
    /// Why the file could not be written.
    pub fn write(&self, path: &Path) -> Result<(), String> {
        replace(path, self.text()?.as_bytes())
    }

    /// Reads a file.
    ///
    /// # Errors
    ///
    /// Why it cannot be read, or is no such file.
    pub fn read(path: &Path) -> Result<Self, String> {
        let at = path.display();
        let size = std::fs::metadata(path).map_err(|e| format!("{at}: {e}"))?.len();
        if size > MOST_BYTES {
            return Err(format!("{at}: {size} bytes, more than any results of this program"));
        }
        let text = std::fs::read_to_string(path).map_err(|e| format!("{at}: {e}"))?;
        Self::parse(&text).map_err(|e| format!("{at}: {e}"))
    }

    /// A report from its text.
    ///
    /// # Errors
    ///
    /// What does not fit.
    pub fn parse(text: &str) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Head {
            format: Option<String>,
            version: Option<serde_json::Value>,
        }
        let head: Head = serde_json::from_str(text).map_err(|e| {
            if text.trim().is_empty() {
                "the file is empty".into()
            } else if e.is_eof() {
                format!(
                    "the file breaks off ({e}): it was cut short; measure again or copy it again"
                )
            } else {
                format!("not a file of results: {e}")
            }
        })?;
        if head.format.as_deref() != Some(FORMAT) {
            return Err(format!("not a file of results: `format` is not \"{FORMAT}\""));
        }
        match head.version.as_ref().and_then(serde_json::Value::as_u64) {
            Some(VERSION) => {}
            Some(v) if v > VERSION => {
                return Err(format!(
                    "version {v}, and this wgmoe-bench reads version {VERSION}: use a newer \
                     wgmoe-bench"
                ));
            }
            Some(v) => {
                return Err(format!(
                    "version {v}, older than the version {VERSION} that this wgmoe-bench reads: \
                     measure again, or make the page with the wgmoe-bench that wrote it"
                ));
            }
            None => return Err("`version` is not a whole number".into()),
        }
        let report: Self = serde_json::from_str(text)
            .map_err(|e| format!("says that it is version {VERSION}, but does not fit it: {e}"))?;
        report.check()?;
        Ok(report)
    }

    /// Refuses numbers that no run can give: charts are drawn to them.
    fn check(&self) -> Result<(), String> {
        let refuse = |what: &str, v: f64, ok: bool| {
            if v.is_finite() && ok { Ok(()) } else { Err(format!("{what} of {v}")) }
        };
        for adapter in &self.adapters {
            if let Some(c) = &adapter.ceilings {
                let rates = [c.copy_gb_s, c.read_gb_s, c.multiply_add_gflop_s, c.matrix_gflop_s];
                for v in rates.into_iter().chain([c.dispatch_us, c.submit_us]).flatten() {
                    refuse("a ceiling", v, v > 0.0)?;
                }
            }
            for case in &adapter.cases {
                let Some(m) = case.outcome.measured() else { continue };
                for t in [Some(&m.wall), m.gpu.as_ref()].into_iter().flatten() {
                    for v in [t.least_ms, t.q1_ms, t.median_ms, t.q3_ms] {
                        refuse("a time", v, v > 0.0)?;
                    }
                }
                refuse("bytes to move", m.work.bytes, m.work.bytes > 0.0)?;
                let shares = m.bound.iter().flat_map(|b| [b.least_ms, b.share]);
                for v in shares.chain([m.work.flops, m.work.slots, m.work.experts_per_block]) {
                    refuse("an amount of work", v, v >= 0.0)?;
                }
            }
        }
        Ok(())
    }
}

impl Outcome {
    pub(crate) fn measured(&self) -> Option<&Measured> {
        match self {
            Self::Measured(measured) => Some(measured),
            Self::Failed { .. } | Self::Skipped { .. } => None,
        }
    }
}

impl Measured {
    /// The times to compare: the GPU's, or the host's where there are none.
    pub(crate) fn times(&self) -> &Times {
        self.gpu.as_ref().unwrap_or(&self.wall)
    }
}

impl Part {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Routing => "routing",
            Self::Plan => "plan",
            Self::Gather => "gather",
            Self::Experts => "experts",
            Self::Layer => "layer",
        }
    }
}

impl CaseId {
    /// Whether it is what a device is judged by first: a whole layer under the model's own rule.
    pub(crate) fn is_headline(&self) -> bool {
        self.own_rule && self.part == Part::Layer
    }
}

/// Puts `bytes` in the place of `path` in one step, so that a crash leaves the old file or the new
/// one.
///
/// # Errors
///
/// Why it could not be written.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<(), String> {
    let say = |e: std::io::Error| format!("{}: {e}", path.display());
    let mut beside = path.as_os_str().to_owned();
    beside.push(".part");
    let beside = Path::new(&beside);
    let write = || {
        let mut file = std::fs::File::create(beside)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(beside, path)
    };
    write().map_err(|e| {
        let _ = std::fs::remove_file(beside);
        say(e)
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn measured(median_ms: f64) -> Outcome {
        let times = |median_ms: f64| Times {
            median_ms,
            q1_ms: median_ms * 0.75,
            q3_ms: median_ms * 1.25,
            least_ms: median_ms * 0.5,
            count: 7,
        };
        Outcome::Measured(Measured {
            wall: times(median_ms * 1.5),
            gpu: Some(times(median_ms)),
            gpu_dropped: None,
            repeats: 1,
            inputs: 2,
            weight_copies: 1,
            settled: true,
            work: Work {
                bytes: 1e6,
                flops: 2e6,
                dispatches: 9.0,
                slots: 288.0,
                experts_touched: 20.0,
                experts_per_block: 20.0,
            },
            bound: Some(Bound { by: BoundBy::Memory, least_ms: median_ms / 4.0, share: 0.25 }),
            check: "whole".into(),
        })
    }

    pub(crate) fn case(rule: &str, outcome: Outcome) -> Case {
        let id = CaseId {
            model: "llada2-mini".into(),
            experts: 256,
            experts_of_model: 256,
            load: Load::Block,
            tokens: 32,
            rule: rule.into(),
            own_rule: rule == "original",
            part: Part::Layer,
            weights: "bf16".into(),
        };
        Case { id, reduced: None, outcome }
    }

    /// A report of one adapter.
    pub(crate) fn report(name: &str, cases: Vec<Case>) -> Report {
        let mut report = Report::new(false, None);
        report.adapters.push(Adapter {
            name: name.into(),
            vendor: 0x10de,
            backend: "vulkan".into(),
            kind: "DiscreteGpu".into(),
            driver: "a driver 1.0".into(),
            features: vec!["timestamps".into()],
            matrix_units: String::new(),
            max_binding_bytes: 1 << 31,
            max_buffer_bytes: 1 << 31,
            failure: None,
            ceilings: Some(Ceilings {
                copy_gb_s: Some(400.0),
                read_gb_s: Some(500.0),
                multiply_add_gflop_s: Some(2e4),
                matrix_gflop_s: None,
                dispatch_us: Some(3.0),
                submit_us: Some(50.0),
                notes: vec![],
            }),
            cases,
        });
        report
    }

    fn text(report: &Report) -> String {
        serde_json::to_string_pretty(report).unwrap()
    }

    #[test]
    fn a_file_comes_back_as_it_was() {
        let skipped = Outcome::Skipped { reason: "no time".into() };
        let failed = Outcome::Failed { reason: "at 3: got 1, want 2".into() };
        let cases = vec![case("original", measured(1.0)), case("a", skipped), case("b", failed)];
        let report = report("a GPU", cases);
        assert_eq!(Report::parse(&text(&report)), Ok(report.clone()));

        let folder = std::env::temp_dir().join(format!("wgmoe-bench-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join("results.json");
        std::fs::write(&path, "old").unwrap();
        report.write(&path).unwrap();
        assert_eq!(Report::read(&path), Ok(report.clone()));
        let names: Vec<_> =
            std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["results.json"], "nothing is left beside it");
        // A path that cannot be written is named.
        let error = report.write(&folder.join("no/such/folder.json")).unwrap_err();
        assert!(error.contains("no/such/folder.json"), "{error}");
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn files_that_do_not_fit_are_refused_with_the_reason() {
        let good = text(&report("a GPU", vec![case("original", measured(1.0))]));
        let cut = &good[..good.len() / 2];
        let newer = good.replace("\"version\": 1,", "\"version\": 2,");
        let older = good.replace("\"version\": 1,", "\"version\": 0,");
        let worded = good.replace("\"version\": 1,", "\"version\": \"one\",");
        let missing = good.replace("\"quick\": false,", "");
        let negative = good.replace("\"least_ms\": 0.5,", "\"least_ms\": -0.5,");
        let huge = good.replace("\"least_ms\": 0.5,", "\"least_ms\": 1e999,");
        assert_ne!(newer, good);
        assert_ne!(missing, good);
        assert_ne!(negative, good);
        for (text, reason) in [
            ("", "the file is empty"),
            (cut, "the file breaks off"),
            ("<html>", "not a file of results"),
            ("[1, 2]", "not a file of results"),
            ("{\"version\": 1}", "`format` is not"),
            (&newer, "version 2, and this wgmoe-bench reads version 1: use a newer wgmoe-bench"),
            (&older, "version 0, older than the version 1"),
            (&worded, "`version` is not a whole number"),
            (&missing, "missing field `quick`"),
            (&negative, "a time of -0.5"),
            (&huge, "out of range"),
        ] {
            let error = Report::parse(text).unwrap_err();
            assert!(error.contains(reason), "{error:?} should say {reason:?}");
        }
    }
}
