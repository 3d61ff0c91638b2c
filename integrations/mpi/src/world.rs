//! The ranks of a job: waiting for them with a time limit, and telling them of a failure.
use crate::wire::{Memory, Transfer, Wire};
use crate::{Error, Result};
use mpi::topology::Communicator;
use std::cell::RefCell;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// Tags of messages. Those of rows follow [`tag::ROWS`].
pub(crate) mod tag {
    /// A rank failed: why.
    pub(crate) const FAULT: i32 = 1;
    /// Are you there?
    pub(crate) const PING: i32 = 2;
    /// Here.
    pub(crate) const PONG: i32 = 3;
    /// What must be the same on every rank.
    pub(crate) const SHAPE: i32 = 4;
    /// Tokens of a batch.
    pub(crate) const TOKENS: i32 = 5;
    /// Rows of each expert.
    pub(crate) const COUNTS: i32 = 6;
    /// Selection values or gates of a rank's experts.
    pub(crate) const VALUES: i32 = 7;
    /// Which tokens experts took.
    pub(crate) const CHOICE: i32 = 8;
    /// Hidden rows, and back: two for each round, modulo [`ROUNDS`].
    pub(crate) const ROWS: i32 = 64;
    /// Rounds that have tags of their own.
    pub(crate) const ROUNDS: usize = 1024;
}

/// The ranks of a job. Clones are the same ranks.
///
/// MPI's own behaviour is that a process which dies takes the job with it: Open MPI's `mpirun` then
/// ends all others, and its message says which rank it was. What a launcher does not see (a rank that
/// hangs, a launcher told to go on) the ranks see themselves: whoever waits for a rank longer than the
/// time limit asks it for a sign of life, and returns [`Error::Silent`] with the ranks that gave none.
/// Ranks answer while they are inside a call of this crate, so the limit must be longer than ranks drift
/// apart between calls.
///
/// After an error messages may be on their way that nobody waits for. Where all ranks are alive, a new
/// `World` of the same communicator begins anew. Where one is gone, end the process by
/// [`World::abort`], or by [`std::process::exit`]: `MPI_Finalize` may wait for it for ever.
#[derive(Clone, Debug)]
pub struct World {
    inner: Rc<Inner>,
}

#[derive(Debug)]
struct Inner {
    wire: Wire,
    limit: Duration,
    /// The failure of another rank that this one has been told of.
    fault: RefCell<Option<Error>>,
    /// When each rank last answered.
    heard: RefCell<Vec<Option<Instant>>>,
    small: RefCell<Vec<Transfer>>,
}

impl Inner {
    /// The other ranks, beginning with the next one, so that not all begin with the same.
    fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let (rank, ranks) = (self.wire.rank, self.wire.ranks);
        (1..ranks).map(move |i| (rank + i) % ranks)
    }

    fn fail(&self, reason: &str) {
        let mut text = format!("{reason}\0").into_bytes();
        text.truncate(4096);
        let start = Instant::now();
        let mut sent: Vec<_> = self
            .others()
            .filter_map(|to| self.wire.send(Memory::Bytes(text.clone()), to, tag::FAULT).ok())
            .collect();
        // Small messages are on their way at once; a rank that is gone takes none.
        while start.elapsed() < Duration::from_millis(500) {
            sent.retain_mut(|t| matches!(t.test(), Ok(false)));
            if sent.is_empty() {
                break;
            }
            pause();
        }
    }
}

/// Where a rank panics, the others are told before `MPI_Finalize`, which would wait for them.
impl Drop for Inner {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.fail("it panicked");
        }
    }
}

/// The time limit that [`World::new`] takes.
pub const LIMIT: Duration = Duration::from_secs(30);

/// What a wait has come to.
pub(crate) enum State {
    Done,
    /// Something happened since it was last asked, or nothing; and who is waited for.
    Waiting {
        progress: bool,
        on: Vec<usize>,
    },
}

impl World {
    /// The ranks of a communicator, with a time limit of 30 s ([`LIMIT`]). Called by all of them.
    ///
    /// # Errors
    ///
    /// [`Error::Silent`] where not all of them call within the limit; [`Error::Mpi`].
    pub fn new(of: &impl Communicator) -> Result<Self> {
        Self::with_limit(of, LIMIT)
    }

    /// The same with another time limit.
    ///
    /// # Errors
    ///
    /// As [`World::new`].
    pub fn with_limit(of: &impl Communicator, limit: Duration) -> Result<Self> {
        let start = Instant::now();
        let (rank, ranks) = (of.rank() as usize, of.size() as usize);
        let wire = Wire::new(of, || {
            pause();
            if start.elapsed() < limit {
                return Ok(());
            }
            // MPI does not say which of them came.
            let ranks = (0..ranks).filter(|r| *r != rank).collect();
            let what = "not all of them made a `World`".into();
            Err(Error::Silent { ranks, seconds: limit.as_secs_f64(), what })
        })?;
        Ok(Self {
            inner: Rc::new(Inner {
                heard: RefCell::new(vec![None; wire.ranks]),
                wire,
                limit,
                fault: RefCell::default(),
                small: RefCell::default(),
            }),
        })
    }

    /// This rank.
    pub fn rank(&self) -> usize {
        self.inner.wire.rank
    }

    /// Ranks there are.
    pub fn ranks(&self) -> usize {
        self.inner.wire.ranks
    }

    /// The time limit.
    pub fn limit(&self) -> Duration {
        self.inner.limit
    }

    pub(crate) fn others(&self) -> impl Iterator<Item = usize> + use<> {
        self.inner.others()
    }

    pub(crate) fn wire(&self) -> &Wire {
        &self.inner.wire
    }

    /// Tells every other rank that this one failed, so that their calls end with an error that names
    /// it. The calls of this crate do so themselves, and so does a panic; for failures between calls.
    pub fn fail(&self, reason: &str) {
        self.inner.fail(reason);
    }

    /// Ends the job, every rank of it, as MPI does where errors are fatal.
    pub fn abort(&self, code: i32) -> ! {
        self.wire().abort(code)
    }

    /// Runs a call that all ranks take part in. Where it fails here, the others are told.
    pub(crate) fn telling<T>(&self, call: impl FnOnce() -> Result<T>) -> Result<T> {
        // What was under way may still be, and would be taken for what comes next.
        if let Some(fault) = self.inner.fault.borrow().clone() {
            return Err(fault);
        }
        let result = call();
        match &result {
            // Others know, or find out in the same way.
            Ok(_) | Err(Error::Rank { .. } | Error::Differs { .. } | Error::Idle { .. }) => {}
            Err(e) => {
                self.fail(&e.to_string());
                self.inner.fault.borrow_mut().get_or_insert_with(|| e.clone());
                return result;
            }
        }
        // Whom a rank was told of is more than what it saw itself.
        match (result, self.inner.fault.borrow().clone()) {
            (Err(_), Some(fault)) => Err(fault),
            (result, _) => result,
        }
    }

    /// Waits until `poll` is done, within the time limit since something last happened.
    pub(crate) fn wait(&self, what: &str, mut poll: impl FnMut() -> Result<State>) -> Result<()> {
        let limit = self.limit();
        let mut since = Instant::now();
        let mut asked = None;
        let mut idle = 0;
        loop {
            let (progress, on) = match poll()? {
                State::Done => return Ok(()),
                State::Waiting { progress, on } => (progress, on),
            };
            self.serve()?;
            if progress {
                (since, asked, idle) = (Instant::now(), None, 0);
                continue;
            }
            idle += 1;
            if idle > 20 {
                pause();
            }
            let waited = since.elapsed();
            if waited > limit / 2 && asked.is_none() {
                for &rank in &on {
                    self.small(vec![0], rank, tag::PING)?;
                }
                asked = Some(Instant::now());
            }
            if waited < limit {
                continue;
            }
            // Who has answered is alive, and waits for somebody else, who will be named.
            let heard = self.inner.heard.borrow();
            let silent = |r: &usize| heard[*r].is_none_or(|at| Some(at) < asked);
            let mut ranks: Vec<usize> = on.iter().copied().filter(silent).collect();
            ranks.sort_unstable();
            ranks.dedup();
            if ranks.is_empty() && waited > 2 * limit {
                ranks = on;
            }
            if !ranks.is_empty() {
                let (seconds, what) = (limit.as_secs_f64(), what.to_string());
                return Err(Error::Silent { ranks, seconds, what });
            }
        }
    }

    /// Sends a message that nobody waits for.
    fn small(&self, bytes: Vec<u8>, to: usize, tag: i32) -> Result<()> {
        let sent = self.wire().send(Memory::Bytes(bytes), to, tag)?;
        self.inner.small.borrow_mut().push(sent);
        Ok(())
    }

    /// Answers other ranks, and hears of their failures.
    fn serve(&self) -> Result<()> {
        self.inner.small.borrow_mut().retain_mut(|t| matches!(t.test(), Ok(false)));
        while let Some((from, len)) = self.wire().probe(tag::PING)? {
            self.take(from, len, tag::PING)?;
            self.small(vec![0], from, tag::PONG)?;
        }
        while let Some((from, len)) = self.wire().probe(tag::PONG)? {
            self.take(from, len, tag::PONG)?;
            self.inner.heard.borrow_mut()[from] = Some(Instant::now());
        }
        if let Some((rank, len)) = self.wire().probe(tag::FAULT)? {
            let text = self.take(rank, len, tag::FAULT)?;
            let text = String::from_utf8_lossy(&text);
            let reason = text.trim_end_matches('\0').to_string();
            let fault = Error::Rank { rank, reason };
            *self.inner.fault.borrow_mut() = Some(fault.clone());
            return Err(fault);
        }
        Ok(())
    }

    /// A message that has come.
    fn take(&self, from: usize, len: usize, tag: i32) -> Result<Vec<u8>> {
        let mut message = self.wire().receive(Memory::Bytes(vec![0; len]), from, tag)?;
        let start = Instant::now();
        while !message.test()? {
            if start.elapsed() > self.limit() {
                let (ranks, seconds) = (vec![from], self.limit().as_secs_f64());
                return Err(Error::Silent { ranks, seconds, what: "the rest of a message".into() });
            }
            std::hint::spin_loop();
        }
        Ok(message.bytes())
    }

    /// Bytes to every rank and from every rank, this one included; of `lens[r]` bytes from rank r.
    pub(crate) fn all_to_all(
        &self,
        what: &str,
        tag: i32,
        mut to: Vec<Vec<u8>>,
        lens: &[usize],
    ) -> Result<Vec<Vec<u8>>> {
        let mut got: Vec<Vec<u8>> = vec![vec![]; self.ranks()];
        got[self.rank()] = std::mem::take(&mut to[self.rank()]);
        let mut receives = vec![];
        let mut sends = vec![];
        for r in self.others() {
            if lens[r] > 0 {
                let memory = Memory::Bytes(vec![0; lens[r]]);
                receives.push(self.wire().receive(memory, r, tag)?);
            }
            if !to[r].is_empty() {
                let memory = Memory::Bytes(std::mem::take(&mut to[r]));
                sends.push(self.wire().send(memory, r, tag)?);
            }
        }
        self.wait(what, || {
            let before = receives.len() + sends.len();
            let mut i = 0;
            while i < receives.len() {
                if receives[i].test()? {
                    let message = receives.swap_remove(i);
                    let from = message.rank;
                    got[from] = message.bytes();
                } else {
                    i += 1;
                }
            }
            let mut error = Ok(());
            sends.retain_mut(|t| match t.test() {
                Ok(done) => !done,
                Err(e) => {
                    error = Err(e);
                    false
                }
            });
            error?;
            let left = receives.len() + sends.len();
            if left == 0 {
                return Ok(State::Done);
            }
            let on = receives.iter().chain(&sends).map(|t| t.rank).collect();
            Ok(State::Waiting { progress: left < before, on })
        })?;
        Ok(got)
    }

    /// The same bytes to every rank; of one length everywhere.
    pub(crate) fn all_gather(&self, what: &str, tag: i32, own: Vec<u8>) -> Result<Vec<Vec<u8>>> {
        let lens = vec![own.len(); self.ranks()];
        self.all_to_all(what, tag, vec![own; self.ranks()], &lens)
    }

    /// An error for what differs between ranks: lines `name=value`, in an order of their own.
    pub(crate) fn agree(&self, lines: &[(&str, String)]) -> Result<()> {
        const BYTES: usize = 4096;
        let mut own = String::new();
        for (name, value) in lines {
            own += &format!("{name}={}\n", value.replace('\n', " "));
        }
        let mut bytes = own.into_bytes();
        bytes.resize(BYTES, 0);
        let all = self.all_gather("what the ranks have", tag::SHAPE, bytes)?;
        let all: Vec<String> = all.iter().map(|b| String::from_utf8_lossy(b).into()).collect();
        let value = |r: usize, name: &str| -> String {
            let line = all[r].lines().find_map(|l| l.strip_prefix(&format!("{name}=")));
            line.unwrap_or("missing").into()
        };
        for (name, _) in lines {
            let values: Vec<String> = (0..self.ranks()).map(|r| value(r, name)).collect();
            let times = |v: &String| values.iter().filter(|other| *other == v).count();
            // Of equally many the first: rank 0's.
            let Some(most) = values.iter().rev().max_by_key(|v| times(v)).cloned() else {
                continue;
            };
            let ranks: Vec<usize> = (0..self.ranks()).filter(|r| values[*r] != most).collect();
            if let Some(&first) = ranks.first() {
                let (field, theirs) = (name.to_string(), values[first].clone());
                return Err(Error::Differs { ranks, field, theirs, ours: most });
            }
        }
        Ok(())
    }

    /// The same of what some ranks do not have.
    pub(crate) fn agree_some(&self, name: &str, own: Option<String>) -> Result<()> {
        const BYTES: usize = 512;
        let mut bytes = own.unwrap_or_default().into_bytes();
        bytes.resize(BYTES, 0);
        let all = self.all_gather("what the ranks have", tag::SHAPE, bytes)?;
        let text = |b: &Vec<u8>| String::from_utf8_lossy(b).trim_end_matches('\0').to_string();
        let all: Vec<String> = all.iter().map(text).collect();
        let Some(ours) = all.iter().find(|v| !v.is_empty()).cloned() else { return Ok(()) };
        let differs = |r: &usize| !all[*r].is_empty() && all[*r] != ours;
        let ranks: Vec<usize> = (0..all.len()).filter(differs).collect();
        match ranks.first() {
            None => Ok(()),
            Some(&first) => {
                let (field, theirs) = (name.to_string(), all[first].clone());
                Err(Error::Differs { ranks, field, theirs, ours })
            }
        }
    }

    /// An error for ranks that `idle` says hold nothing of something.
    pub(crate) fn none_idle(&self, what: &str, idle: impl Fn(usize) -> bool) -> Result<()> {
        let ranks: Vec<usize> = (0..self.ranks()).filter(|r| idle(*r)).collect();
        if ranks.is_empty() {
            return Ok(());
        }
        Err(Error::Idle { ranks, of: self.ranks(), what: what.into() })
    }
}

/// Gives way to the other ranks and the driver's threads of this machine.
pub(crate) fn pause() {
    std::thread::sleep(Duration::from_micros(30));
}
