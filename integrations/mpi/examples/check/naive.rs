//! Another way to move rows, as an engine would bring one: the least that [`Exchange`] asks for.
use wgmoe_mpi::mpi::request::{Request, StaticScope};
use wgmoe_mpi::mpi::topology::SimpleCommunicator;
use wgmoe_mpi::mpi::traits::*;
use wgmoe_mpi::wgmoe::{Gpu, Slice};
use wgmoe_mpi::{Exchange, Part, Result};

/// Reads what is to be sent, sends it from memory that is never freed, and receives what has come.
pub struct Naive {
    gpu: Gpu,
    comm: SimpleCommunicator,
    sending: Vec<(u64, Request<'static, [u8], StaticScope>)>,
    waiting: Vec<(u64, Place)>,
    next: u64,
}

struct Place {
    buffer: wgmoe_mpi::wgmoe::wgpu::Buffer,
    at: u64,
    rank: usize,
    tag: i32,
}

impl Naive {
    pub fn new(gpu: &Gpu) -> Self {
        let comm = SimpleCommunicator::world();
        Self { gpu: gpu.clone(), comm, sending: vec![], waiting: vec![], next: 0 }
    }
}

impl Exchange for Naive {
    fn start(&mut self, sends: &[Part<'_>], receives: &[Part<'_>]) -> Result<u64> {
        self.next += 1;
        for part in sends {
            let bytes = part.bytes.end - part.bytes.start;
            let slice = Slice::new(part.buffer, part.bytes.start, bytes);
            let rows: &'static [u8] = self.gpu.download::<u8>(slice)?.leak();
            let to = self.comm.process_at_rank(part.rank as i32);
            let request = to.immediate_send_with_tag(StaticScope, rows, part.tag);
            self.sending.push((self.next, request));
        }
        for part in receives {
            let (buffer, at) = (part.buffer.clone(), part.bytes.start);
            let place = Place { buffer, at, rank: part.rank, tag: part.tag };
            self.waiting.push((self.next, place));
        }
        Ok(self.next)
    }

    fn poll(&mut self) -> Result<bool> {
        let before = self.waiting.len() + self.sending.len();
        for (ticket, request) in std::mem::take(&mut self.sending) {
            if let Err(request) = request.test() {
                self.sending.push((ticket, request));
            }
        }
        let (gpu, comm) = (&self.gpu, &self.comm);
        self.waiting.retain(|(_, place)| {
            let from = comm.process_at_rank(place.rank as i32);
            if from.immediate_probe_with_tag(place.tag).is_none() {
                return true;
            }
            let (rows, _) = from.receive_vec_with_tag::<u8>(place.tag);
            gpu.queue.write_buffer(&place.buffer, place.at, &rows);
            false
        });
        Ok(self.waiting.len() + self.sending.len() < before)
    }

    fn done(&self, ticket: u64) -> bool {
        self.waiting.iter().all(|(of, _)| *of != ticket)
            && self.sending.iter().all(|(of, _)| *of != ticket)
    }

    fn ranks(&self) -> Vec<usize> {
        self.waiting.iter().map(|(_, place)| place.rank).collect()
    }
}
