//! The program `wgmoe-bench`: lists adapters, measures them into a file, and makes a page of files.
mod start;
mod terminal;

use clap::{Parser, Subcommand};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use terminal::{Terminal, stop_at_ctrl_c};
use testkit::block_on;
use wgmoe::{Precision, WeightType, wgpu};
use wgmoe_bench::{NO_ADAPTERS, Plan, Report, adapters, find, first, list, page, replace};

/// Benchmarks mixture-of-experts kernels on any GPU, and compares the results.
#[derive(Parser)]
#[command(version)]
struct Options {
    #[command(subcommand)]
    command: What,
}

#[derive(Subcommand)]
enum What {
    /// List the adapters of all backends
    Devices,
    /// Measure one adapter, or all
    Run(RunOptions),
    /// Time a layer's first output, kernels being compiled
    Start {
        /// Adapter, by its index in `devices` or a part of its name
        #[arg(long, value_name = "NAME|INDEX")]
        adapter: Option<String>,
        /// Tokens of a batch
        #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=4096))]
        tokens: u32,
        /// A file of pipelines, which a run before may have written
        #[arg(long, value_name = "FILE")]
        cache: Option<PathBuf>,
    },
    /// Compare results on a page
    Report {
        /// Files that `run` wrote
        #[arg(required = true)]
        files: Vec<PathBuf>,
        /// The page
        #[arg(short, long, default_value = "report.html")]
        output: PathBuf,
    },
}

#[derive(clap::Args)]
struct RunOptions {
    /// Two models with 32 or 64 of their experts, decoding: under two minutes an adapter, also on
    /// a software driver
    #[arg(long)]
    quick: bool,
    /// Adapter, by its index in `devices` or a part of its name [default: a GPU before a software
    /// driver]
    #[arg(long, value_name = "NAME|INDEX", conflicts_with = "all")]
    adapter: Option<String>,
    /// Every adapter, one after another
    #[arg(long)]
    all: bool,
    /// Minutes for each adapter, at most; what does not fit is skipped and marked
    #[arg(long, value_parser = minutes, allow_negative_numbers = true)]
    minutes: Option<f64>,
    /// GiB for a layer's weights, at most [default: 8 on a discrete GPU, 1 on a software driver,
    /// else 4]
    #[arg(long, value_name = "GIB", value_parser = clap::value_parser!(u64).range(1..=1024))]
    memory: Option<u64>,
    /// What the experts are stored as, such as bf16, q8_0 or q4_k
    #[arg(long, default_value = "bf16")]
    weights: WeightType,
    /// Experts of many rows on matrix units, where the adapter has some that the kernels know: `full`
    /// (as exact as f32) or `half` (f16)
    #[arg(long, value_name = "PRECISION", value_parser = precision, num_args = 0..=1,
        default_missing_value = "full")]
    matrix_units: Option<Precision>,
    /// The file of results; replaced
    #[arg(short, long, default_value = "results.json")]
    output: PathBuf,
}

fn minutes(text: &str) -> Result<f64, String> {
    let minutes: f64 = text.parse().map_err(|_| "not a number")?;
    if minutes > 0.0 && minutes <= 1440.0 { Ok(minutes) } else { Err("0 to 1440".into()) }
}

fn precision(text: &str) -> Result<Precision, String> {
    match text {
        "full" => Ok(Precision::Full),
        "half" => Ok(Precision::Half),
        _ => Err("full or half".into()),
    }
}

/// Minutes for each adapter, where not given.
const MINUTES: f64 = 9.0;
const QUICK_MINUTES: f64 = 1.25;

fn main() -> ExitCode {
    let done = match Options::parse().command {
        What::Devices => {
            print(&list(&block_on(adapters())));
            Ok(ExitCode::SUCCESS)
        }
        What::Run(options) => run(&options),
        What::Start { adapter, tokens, cache } => {
            start(adapter.as_deref(), tokens, cache.as_deref())
        }
        What::Report { files, output } => report(&files, &output),
    };
    done.unwrap_or_else(|e| {
        eprintln!("wgmoe-bench: {e}");
        ExitCode::FAILURE
    })
}

/// The adapters, and the place of the wanted one among them.
fn choose(want: Option<&str>) -> Result<(Vec<wgpu::Adapter>, usize), String> {
    let adapters = block_on(adapters());
    let index = match want {
        Some(want) => find(&adapters, want)?,
        None => first(&adapters).ok_or(NO_ADAPTERS)?,
    };
    Ok((adapters, index))
}

fn start(adapter: Option<&str>, tokens: u32, cache: Option<&Path>) -> Result<ExitCode, String> {
    let (adapters, index) = choose(adapter)?;
    print(&block_on(start::start(&adapters[index], tokens, cache))?);
    Ok(ExitCode::SUCCESS)
}

fn run(options: &RunOptions) -> Result<ExitCode, String> {
    let adapters = if options.all {
        block_on(adapters())
    } else {
        let (mut adapters, index) = choose(options.adapter.as_deref())?;
        vec![adapters.swap_remove(index)]
    };
    if adapters.is_empty() {
        return Err(NO_ADAPTERS.into());
    }
    let minutes = options.minutes.unwrap_or(if options.quick { QUICK_MINUTES } else { MINUTES });
    let mut plan = Plan::new(60.0 * minutes, stop_at_ctrl_c()?);
    plan.quick = options.quick;
    plan.memory = options.memory.map(|gib| gib << 30);
    plan.weights = options.weights;
    plan.matrix_units = options.matrix_units;
    plan.commit = commit();
    let mut terminal = Terminal::new(&options.output);
    let report = block_on(wgmoe_bench::run(&adapters, &plan, &mut terminal))?;
    print(&format!("{}\n{}", options.output.display(), report.summary()));
    Ok(match (report.interrupted(), report.is_good()) {
        (true, _) => ExitCode::from(130),
        (false, false) => ExitCode::FAILURE,
        (false, true) => ExitCode::SUCCESS,
    })
}

fn report(files: &[PathBuf], output: &Path) -> Result<ExitCode, String> {
    let reports = files.iter().map(|f| Report::read(f)).collect::<Result<Vec<_>, _>>()?;
    replace(output, page(&reports).as_bytes())?;
    print(&format!("{}\n", output.display()));
    Ok(ExitCode::SUCCESS)
}

/// The commit of this crate's source: `WGMOE_COMMIT` at build time, or that of the repository that
/// the program was built in, where it is still there; `+` where the source differs from it.
fn commit() -> Option<String> {
    if let Some(commit) = option_env!("WGMOE_COMMIT") {
        return Some(commit.into());
    }
    // This package is a folder of the repository.
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).parent()?;
    let git = |args: &[&str]| {
        let output = Command::new("git").arg("-C").arg(source).args(args).output().ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| text.trim().to_string())
    };
    // Not of a repository that the source merely lies in.
    if Path::new(&git(&["rev-parse", "--show-toplevel"])?) != source {
        return None;
    }
    let commit = git(&["rev-parse", "--short=12", "HEAD"])?;
    let changed = git(&["status", "--porcelain", "--untracked-files=no"])?;
    Some(if changed.is_empty() { commit } else { commit + "+" })
}

fn print(text: &str) {
    // Whoever read it may be gone.
    let _ = std::io::Write::write_all(&mut std::io::stdout(), text.as_bytes());
}
