//! The calls of MPI: messages that do not block, and that own their memory. The only file with unsafe
//! code.
//!
//! `mpi`'s own non-blocking calls borrow memory for a scope. Here transfers start and end at any time
//! within a loop, and their memory is often a mapped buffer, so that each keeps its memory until MPI is
//! done with it.
#![allow(unsafe_code)]
use crate::{Error, Result};
use mpi::ffi;
use mpi::topology::Communicator;
use std::ffi::{c_int, c_void};
use wgmoe::wgpu;

/// A communicator whose errors come back instead of ending the job.
#[derive(Debug)]
pub(crate) struct Wire {
    comm: ffi::MPI_Comm,
    pub(crate) rank: usize,
    pub(crate) ranks: usize,
}

/// What a transfer reads or writes.
pub(crate) enum Memory {
    /// The host's own.
    Bytes(Vec<u8>),
    /// A buffer mapped for reading: sent from where it lies.
    Read(wgpu::BufferView),
    /// A buffer mapped for writing: received into where it lies.
    Write(wgpu::BufferViewMut),
}

impl Memory {
    fn len(&self) -> usize {
        match self {
            Self::Bytes(bytes) => bytes.len(),
            Self::Read(view) => view.len(),
            Self::Write(view) => view.len(),
        }
    }

    fn write_ptr(&mut self) -> Option<*mut c_void> {
        match self {
            Self::Bytes(bytes) => Some(bytes.as_mut_ptr().cast()),
            Self::Write(view) => Some(view.slice(..).as_raw_ptr().as_ptr().cast()),
            Self::Read(_) => None,
        }
    }

    fn read_ptr(&self) -> Option<*const c_void> {
        match self {
            Self::Bytes(bytes) => Some(bytes.as_ptr().cast()),
            Self::Read(view) => Some(view.as_ptr().cast()),
            Self::Write(_) => None,
        }
    }
}

/// A message under way. Dropped before it is done, it leaks its memory, since MPI may still use it.
pub(crate) struct Transfer {
    request: ffi::MPI_Request,
    memory: Option<Memory>,
    /// The other rank.
    pub(crate) rank: usize,
    done: bool,
}

impl Transfer {
    /// Whether it is done; never blocks.
    pub(crate) fn test(&mut self) -> Result<bool> {
        if !self.done {
            let mut flag = 0;
            // SAFETY: the request is ours and active; the status is one that MPI may leave out.
            check(unsafe { ffi::MPI_Test(&mut self.request, &mut flag, ffi::RSMPI_STATUS_IGNORE) })
                .map_err(|e| Error::Mpi(format!("{e}, with rank {}", self.rank)))?;
            self.done = flag != 0;
        }
        Ok(self.done)
    }

    /// The memory, of a transfer that is done.
    pub(crate) fn take(mut self) -> Option<Memory> {
        if self.done { self.memory.take() } else { None }
    }

    /// The bytes, of a transfer of such that is done.
    pub(crate) fn bytes(self) -> Vec<u8> {
        match self.take() {
            Some(Memory::Bytes(bytes)) => bytes,
            _ => vec![],
        }
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        if !self.done {
            std::mem::forget(self.memory.take());
        }
    }
}

impl std::fmt::Debug for Transfer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "a message with rank {}", self.rank)
    }
}

/// An error of MPI's as its text.
fn check(code: c_int) -> Result<()> {
    if code == ffi::MPI_SUCCESS as c_int {
        return Ok(());
    }
    let mut text = vec![0u8; ffi::MPI_MAX_ERROR_STRING as usize + 1];
    let mut len = 0;
    // SAFETY: the text has room for the longest message.
    unsafe { ffi::MPI_Error_string(code, text.as_mut_ptr().cast(), &mut len) };
    text.truncate(len.max(0) as usize);
    Err(Error::Mpi(String::from_utf8_lossy(&text).into_owned()))
}

fn count(bytes: usize) -> Result<c_int> {
    let many = |_| Error::Mpi(format!("a message of {bytes} bytes, MPI counts 31 bits"));
    c_int::try_from(bytes).map_err(many)
}

impl Wire {
    /// A duplicate of a communicator, so that messages of others are not taken for ours. `wait` is
    /// called until the other ranks have come, and ends the wait by an error.
    pub(crate) fn new(
        of: &impl Communicator,
        mut wait: impl FnMut() -> Result<()>,
    ) -> Result<Self> {
        let (rank, ranks) = (of.rank() as usize, of.size() as usize);
        // Written by MPI once the request is done: leaked where it never is.
        // SAFETY: a null communicator is a value.
        let comm = Box::leak(Box::new(unsafe { ffi::RSMPI_COMM_NULL }));
        // SAFETY: a null request is a value; the caller's communicator is valid.
        let mut request = unsafe { ffi::RSMPI_REQUEST_NULL };
        check(unsafe { ffi::MPI_Comm_idup(of.as_raw(), comm, &mut request) })?;
        loop {
            let mut flag = 0;
            // SAFETY: the request is ours.
            check(unsafe { ffi::MPI_Test(&mut request, &mut flag, ffi::RSMPI_STATUS_IGNORE) })?;
            if flag != 0 {
                break;
            }
            wait()?;
        }
        let comm = *comm;
        // SAFETY: the communicator is there by now.
        check(unsafe { ffi::MPI_Comm_set_errhandler(comm, ffi::RSMPI_ERRORS_RETURN) })?;
        Ok(Self { comm, rank, ranks })
    }

    /// Starts to send memory.
    pub(crate) fn send(&self, memory: Memory, to: usize, tag: i32) -> Result<Transfer> {
        let len = count(memory.len())?;
        let no = || Error::Mpi("memory that cannot be read".into());
        let ptr = memory.read_ptr().ok_or_else(no)?;
        // SAFETY: the memory stays where it is until the transfer is done: heap or mapped memory,
        // neither of which moves with its owner, and nothing writes it meanwhile.
        let request = unsafe {
            let mut request = ffi::RSMPI_REQUEST_NULL;
            let byte = ffi::RSMPI_UINT8_T;
            check(ffi::MPI_Isend(ptr, len, byte, to as c_int, tag, self.comm, &mut request))?;
            request
        };
        Ok(Transfer { request, memory: Some(memory), rank: to, done: false })
    }

    /// Starts to fill memory.
    pub(crate) fn receive(&self, mut memory: Memory, from: usize, tag: i32) -> Result<Transfer> {
        let len = count(memory.len())?;
        let no = || Error::Mpi("memory that cannot be written".into());
        let ptr = memory.write_ptr().ok_or_else(no)?;
        // SAFETY: as in `send`, and nothing reads the memory before the transfer is done.
        let request = unsafe {
            let mut request = ffi::RSMPI_REQUEST_NULL;
            let byte = ffi::RSMPI_UINT8_T;
            check(ffi::MPI_Irecv(ptr, len, byte, from as c_int, tag, self.comm, &mut request))?;
            request
        };
        Ok(Transfer { request, memory: Some(memory), rank: from, done: false })
    }

    /// The rank and length of a message with this tag that has come and is not yet received.
    pub(crate) fn probe(&self, tag: i32) -> Result<Option<(usize, usize)>> {
        let mut flag = 0;
        // SAFETY: a status is plain data that MPI fills.
        let mut status: ffi::MPI_Status = unsafe { std::mem::zeroed() };
        let any = unsafe { ffi::RSMPI_ANY_SOURCE };
        check(unsafe { ffi::MPI_Iprobe(any, tag, self.comm, &mut flag, &mut status) })?;
        if flag == 0 {
            return Ok(None);
        }
        let mut len = 0;
        // SAFETY: the status is of a message.
        check(unsafe { ffi::MPI_Get_count(&status, ffi::RSMPI_UINT8_T, &mut len) })?;
        Ok(Some((status.MPI_SOURCE as usize, len.max(0) as usize)))
    }

    /// Ends the job: every rank of it.
    pub(crate) fn abort(&self, code: i32) -> ! {
        // SAFETY: no memory is involved.
        unsafe { ffi::MPI_Abort(self.comm, code) };
        std::process::abort()
    }
}
