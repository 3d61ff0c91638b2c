//! The layer under `mpirun`: bits of one device, and what becomes of ranks that fail. Each test starts
//! ranks of the example `check`.
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The example, which cargo builds before tests run.
fn program() -> PathBuf {
    let test = std::env::current_exe().expect("this test");
    let profile = test.parent().and_then(|deps| deps.parent()).expect("target/<profile>/deps");
    profile.join("examples/check")
}

/// Ranks share cores: one job at a time.
static TURN: Mutex<()> = Mutex::new(());

struct Outcome {
    text: String,
    ok: bool,
    /// From a rank's "fails now" to the end of the job.
    seconds: f64,
}

/// Ranks of the example; killed where they hang.
fn ranks(n: usize, options: &[&str], arguments: &[&str]) -> Outcome {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    // Apart, or lines of ranks and of `mpirun` mix.
    let files = [0, 1].map(|_| tempfile::NamedTempFile::new().expect("a file"));
    let [out, err] = [0, 1].map(|i| Stdio::from(files[i].reopen().expect("the file")));
    let start = Instant::now();
    let mut child = Command::new("mpirun")
        .args(["--oversubscribe", "--mca", "mpi_yield_when_idle", "1", "-n", &n.to_string()])
        .args(options)
        .arg(program())
        .args(arguments)
        .envs([("OMPI_ALLOW_RUN_AS_ROOT", "1"), ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")])
        .stdin(Stdio::null())
        .stdout(out)
        .stderr(err)
        .spawn()
        .expect("`mpirun` of Open MPI: scripts/mpirun --install");
    let mut failing = None;
    let status = loop {
        let said = || std::fs::read_to_string(files[0].path()).expect("the output");
        if failing.is_none() && said().contains("fails now") {
            failing = Some(Instant::now());
        }
        if let Some(status) = child.try_wait().expect("a child") {
            break Some(status);
        }
        if start.elapsed() > Duration::from_secs(900) {
            let _ = child.kill();
            break None;
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let seconds = failing.map_or(0.0, |at| at.elapsed().as_secs_f64());
    let text = files.map(|f| std::fs::read_to_string(f.path()).expect("the output")).concat();
    assert!(status.is_some(), "hangs:\n{text}");
    Outcome { text, ok: status.is_some_and(|s| s.success()), seconds }
}

fn equal(n: usize, arguments: &[&str], cases: usize) {
    let outcome = ranks(n, &[], arguments);
    let want = format!("{cases} of {cases} cases equal to one device on {n} ranks");
    assert!(outcome.ok && outcome.text.contains(&want), "{}", outcome.text);
}

#[test]
fn four_ranks_have_the_bits_of_one_device() {
    equal(4, &["bits"], 88);
}

#[test]
fn two_ranks_have_the_bits_of_one_device() {
    equal(2, &["bits", "197 tokens"], 22);
}

/// The first rank has 80 tokens, of which 16 would make a small item of a shared expert; on one device they
/// are in a whole tile.
#[test]
fn small_items_have_the_bits_of_one_device() {
    equal(3, &["small", "token choice, 132 tokens"], 1);
}

/// Some ranks hold no expert, and some have no token.
#[test]
fn eight_ranks_with_five_experts() {
    equal(8, &["bits", "5 experts"], 44);
}

/// The hook: another way to move rows.
#[test]
fn rows_move_as_an_engine_says() {
    equal(3, &["naive", "132 tokens"], 22);
}

/// The ranks that print an error with this text.
fn told(outcome: &Outcome, text: &str) -> Vec<usize> {
    let lines = outcome.text.lines().filter(|line| line.contains(text));
    let rank = |line: &str| line.strip_prefix("rank ")?.split(':').next()?.parse().ok();
    let mut ranks: Vec<usize> = lines.filter_map(rank).collect();
    ranks.sort_unstable();
    ranks
}

/// Ranks of which rank 2 fails: each of `of` says `text`.
fn fails(fault: &str, options: &[&str], text: &str, of: &[usize]) {
    let at_once = ["shape", "version", "type", "no tokens", "few experts"];
    let outcome = ranks(4, options, &["fault", fault, "2"]);
    assert!(!outcome.ok || !options.is_empty(), "{fault} is no failure: {}", outcome.text);
    assert_eq!(told(&outcome, text), of, "{fault}:\n{}", outcome.text);
    // Each rank waits 4 s before it ends, so that all have their say. At once means when the slowest
    // rank has come: some compile kernels before.
    let most = if at_once.contains(&fault) { 100.0 } else { 14.0 };
    let seconds = outcome.seconds;
    assert!(seconds > 0.0 && seconds < most, "{fault} took {seconds:.1} s:\n{}", outcome.text);
}

#[test]
fn what_differs_is_named_on_every_rank() {
    let all = &[0, 1, 2, 3];
    fails("shape", &[], "rank 2: `intermediate` is 64, on the others it is 32", all);
    fails("version", &[], "engine 2, on the others it is 0.1.0", all);
    fails("type", &[], "rank 2: `weights of experts` is ExpertTypes { gate_up: Bf16", all);
    fails("no tokens", &[], "rank 2 of 4: zero tokens", all);
    fails("few experts", &[], "rank 3 of 4: no expert of 3", all);
}

#[test]
fn what_fails_on_one_rank_is_told_to_all() {
    fails("weights", &[], "rank 2 failed: `weights of experts`", &[0, 1, 3]);
    fails("fails", &[], "rank 2 failed: out of cheese", &[0, 1, 3]);
    fails("panics", &[], "rank 2 failed: it panicked", &[0, 1, 3]);
}

/// The limit is 4 s here.
#[test]
fn silent_ranks_are_named() {
    fails("stopped", &[], "rank 2 silent for 4 s: rows of each expert", &[0, 1, 3]);
    fails("late", &[], "rank 2 silent for 4 s", &[0, 1, 3]);
}

/// `mpirun` ends a job of which a process was killed, and says which.
#[test]
fn a_killed_rank_ends_the_others() {
    let outcome = ranks(4, &[], &["fault", "killed", "2"]);
    let said = "process rank 2";
    assert!(!outcome.ok && outcome.text.contains(said), "{}", outcome.text);
    assert!(outcome.text.contains("signal 9"), "{}", outcome.text);
    assert!(outcome.seconds > 0.0 && outcome.seconds < 10.0, "{:.1} s", outcome.seconds);
}

/// Where the launcher goes on, the ranks see it themselves.
#[test]
fn a_killed_rank_is_seen_without_the_launcher() {
    let on = ["--mca", "orte_enable_recovery", "1"];
    fails("killed", &on, "rank 2 silent for 4 s: rows of each expert", &[0, 1, 3]);
}
