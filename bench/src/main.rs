//! How fast a GPU is at mixture-of-experts work: measures every part of the layers of known models
//! on this machine's adapters, writes a file, and makes a page that compares files.
mod ceilings;
mod device;
mod file;
mod matrix;
mod page;
mod run;
mod subject;
mod timing;

use clap::{Parser, Subcommand};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

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
    /// The file of results; replaced
    #[arg(short, long, default_value = "results.json")]
    output: PathBuf,
}

fn minutes(text: &str) -> Result<f64, String> {
    let minutes: f64 = text.parse().map_err(|_| "not a number")?;
    if minutes > 0.0 && minutes <= 1440.0 { Ok(minutes) } else { Err("0 to 1440".into()) }
}

/// Minutes for each adapter, where not given.
const MINUTES: f64 = 9.0;
const QUICK_MINUTES: f64 = 1.25;

fn main() -> ExitCode {
    let done = match Options::parse().command {
        What::Devices => {
            print(&device::list(&device::adapters()));
            Ok(ExitCode::SUCCESS)
        }
        What::Run(options) => run(&options),
        What::Report { files, output } => report(&files, &output),
    };
    done.unwrap_or_else(|e| {
        eprintln!("wgmoe-bench: {e}");
        ExitCode::FAILURE
    })
}

fn run(options: &RunOptions) -> Result<ExitCode, String> {
    let mut adapters = device::adapters();
    if !options.all {
        let index = match &options.adapter {
            Some(want) => device::find(&adapters, want)?,
            None => device::first(&adapters).ok_or(device::NO_ADAPTERS)?,
        };
        adapters = vec![adapters.swap_remove(index)];
    } else if adapters.is_empty() {
        return Err(device::NO_ADAPTERS.into());
    }
    let minutes = options.minutes.unwrap_or(if options.quick { QUICK_MINUTES } else { MINUTES });
    let plan = run::Plan {
        quick: options.quick,
        seconds: 60.0 * minutes,
        memory: options.memory.map(|gib| gib << 30),
        out: &options.output,
        commit: commit(),
        stop: run::stop_at_ctrl_c()?,
    };
    let report = run::run(&adapters, &plan)?;
    print(&format!("{}\n", options.output.display()));
    let mut wrong = false;
    for adapter in &report.adapters {
        let count = |is: fn(&file::Outcome) -> bool| {
            adapter.cases.iter().filter(|case| is(&case.outcome)).count()
        };
        let failed = count(|o| matches!(o, file::Outcome::Failed { .. }));
        wrong |= failed > 0;
        let skipped = count(|o| matches!(o, file::Outcome::Skipped { .. }));
        let measured = count(|o| o.measured().is_some());
        let why = adapter.failure.as_ref().map_or(String::new(), |why| format!("; {why}"));
        print(&format!(
            "{} ({}): {measured} cases measured, {failed} failed, {skipped} skipped{why}\n",
            adapter.name, adapter.backend
        ));
    }
    let none =
        report.adapters.iter().all(|a| a.cases.iter().all(|c| c.outcome.measured().is_none()));
    Ok(match (report.interrupted, wrong || none) {
        (true, _) => ExitCode::from(130),
        (false, true) => ExitCode::FAILURE,
        (false, false) => ExitCode::SUCCESS,
    })
}

fn report(files: &[PathBuf], output: &Path) -> Result<ExitCode, String> {
    let reports = files.iter().map(|f| file::Report::read(f)).collect::<Result<Vec<_>, _>>()?;
    file::replace(output, page::page(&reports).as_bytes())?;
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
