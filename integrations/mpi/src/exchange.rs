//! How rows move between the devices of two ranks.
//!
//! [`Staged`] goes through mapped buffers of the host. An engine whose MPI reads device memory brings
//! an [`Exchange`] of its own to [`ExpertParallel::with_exchange`](crate::ExpertParallel::with_exchange).
use crate::wire::{Memory, Transfer};
use crate::{Result, World};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use wgmoe::wgpu;

/// A range of a device buffer, to send to a rank or to receive from it.
#[derive(Clone, Debug)]
pub struct Part<'a> {
    /// The buffer: `STORAGE`, `COPY_SRC` and `COPY_DST`.
    pub buffer: &'a wgpu::Buffer,
    /// The range; not empty, at multiples of 4.
    pub bytes: Range<u64>,
    /// The other rank.
    pub rank: usize,
    /// Tag of the message. Messages between two ranks with one tag are started in the same order on
    /// both.
    pub tag: i32,
}

/// Moves ranges of device buffers between ranks.
///
/// What an implementation over an MPI that reads device memory does:
///
/// 1. [`start`](Exchange::start): the queue may still work on what is to be sent, so wait for it
///    (`Queue::on_submitted_work_done`, or an external semaphore), without blocking; then `MPI_Isend`
///    from the buffers' device addresses, and `MPI_Irecv` into them at once. The addresses come from
///    how the engine made its device: `wgpu::hal` gives the native handles, which CUDA or HIP import
///    (`VK_KHR_external_memory_fd`).
/// 2. [`poll`](Exchange::poll): `MPI_Test` over what is under way.
/// 3. [`done`](Exchange::done): once all messages of a ticket are through. What is submitted to the
///    queue after that reads what was received, and may overwrite what was sent.
///
/// MPI is called from the thread that made the [`World`], with a communicator of the implementation's
/// own.
pub trait Exchange {
    /// Starts messages; work submitted to the queue before is to be seen by those that send. Never
    /// blocks. The ticket is a number that [`Exchange::done`] knows.
    ///
    /// # Errors
    ///
    /// What MPI or the device refuse.
    fn start(&mut self, sends: &[Part<'_>], receives: &[Part<'_>]) -> Result<u64>;

    /// Lets messages go on, without blocking; whether any did.
    ///
    /// # Errors
    ///
    /// What MPI or the device refuse.
    fn poll(&mut self) -> Result<bool>;

    /// Whether all messages of a ticket are through.
    fn done(&self, ticket: u64) -> bool;

    /// The ranks that messages are under way with.
    fn ranks(&self) -> Vec<usize>;
}

const UNMAPPED: u8 = 0;
const MAPPED: u8 = 1;
const FAILED: u8 = 2;

/// A staging buffer, and whether it is mapped by now.
struct Buffer {
    buffer: wgpu::Buffer,
    state: Arc<AtomicU8>,
}

impl Buffer {
    fn map(&self, mode: wgpu::MapMode) {
        self.state.store(UNMAPPED, Ordering::Relaxed);
        let state = self.state.clone();
        self.buffer.map_async(mode, .., move |result| {
            let now = if result.is_ok() { MAPPED } else { FAILED };
            state.store(now, Ordering::Release);
        });
    }

    fn is_mapped(&self) -> Result<bool> {
        match self.state.load(Ordering::Acquire) {
            FAILED => Err(wgmoe::Error::ReadBack("mapping a staging buffer failed".into()).into()),
            state => Ok(state == MAPPED),
        }
    }
}

/// A message on its way through the host.
enum Message {
    /// Copied from the device, not yet mapped.
    Copied { staging: Buffer, bytes: u64, rank: usize, tag: i32 },
    /// MPI sends it from where it is mapped.
    Sent { staging: Buffer, transfer: Transfer },
    /// MPI receives it into mapped memory.
    Received { staging: Buffer, transfer: Transfer, to: wgpu::Buffer, range: Range<u64> },
}

/// Through mapped buffers of the host: a message is copied into one, sent from where it is mapped,
/// received into another one that is mapped, and copied from there. The buffers are kept, and served
/// again.
pub struct Staged {
    world: World,
    device: wgpu::Device,
    queue: wgpu::Queue,
    under_way: Vec<(u64, Message)>,
    left: HashMap<u64, usize>,
    next: u64,
    reading: Vec<Buffer>,
    writing: Vec<Buffer>,
}

impl Staged {
    /// Of these ranks and this device.
    pub fn new(world: &World, device: &wgpu::Device, queue: &wgpu::Queue) -> Self {
        Self {
            world: world.clone(),
            device: device.clone(),
            queue: queue.clone(),
            under_way: vec![],
            left: HashMap::new(),
            next: 0,
            reading: vec![],
            writing: vec![],
        }
    }

    /// A buffer that serves: the smallest of those at hand that is large enough, or a new one. Sizes
    /// are powers of two, so that those of one step serve the next.
    fn staging(&mut self, bytes: u64, write: bool) -> Buffer {
        let pool = if write { &mut self.writing } else { &mut self.reading };
        let ready = |b: &Buffer| !write || b.state.load(Ordering::Acquire) == MAPPED;
        let fits = pool.iter().enumerate().filter(|(_, b)| b.buffer.size() >= bytes && ready(b));
        if let Some((i, _)) = fits.min_by_key(|(_, b)| b.buffer.size()) {
            return pool.swap_remove(i);
        }
        let usage = if write {
            wgpu::BufferUsages::MAP_WRITE | wgpu::BufferUsages::COPY_SRC
        } else {
            wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST
        };
        let buffer = self.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("rows of another rank"),
            size: bytes.next_power_of_two().max(4096),
            usage,
            mapped_at_creation: write,
        });
        let state = if write { MAPPED } else { UNMAPPED };
        Buffer { buffer, state: Arc::new(AtomicU8::new(state)) }
    }

    /// Takes a message a step further: what is left of it, and whether anything happened.
    fn advance(&mut self, message: Message) -> Result<(Option<Message>, bool)> {
        Ok(match message {
            Message::Copied { staging, bytes, rank, tag } => {
                if !staging.is_mapped()? {
                    return Ok((Some(Message::Copied { staging, bytes, rank, tag }), false));
                }
                let view = staging.buffer.get_mapped_range(..bytes).map_err(mapping)?;
                let transfer = self.world.wire().send(Memory::Read(view), rank, tag)?;
                (Some(Message::Sent { staging, transfer }), true)
            }
            Message::Sent { staging, mut transfer } => {
                if !transfer.test()? {
                    return Ok((Some(Message::Sent { staging, transfer }), false));
                }
                drop(transfer.take());
                staging.buffer.unmap();
                self.reading.push(staging);
                (None, true)
            }
            Message::Received { staging, mut transfer, to, range } => {
                if !transfer.test()? {
                    let message = Message::Received { staging, transfer, to, range };
                    return Ok((Some(message), false));
                }
                drop(transfer.take());
                staging.buffer.unmap();
                let mut encoder = self.device.create_command_encoder(&Default::default());
                let bytes = range.end - range.start;
                encoder.copy_buffer_to_buffer(&staging.buffer, 0, &to, range.start, bytes);
                self.queue.submit([encoder.finish()]);
                staging.map(wgpu::MapMode::Write);
                self.writing.push(staging);
                (None, true)
            }
        })
    }
}

fn mapping(e: impl std::fmt::Display) -> crate::Error {
    wgmoe::Error::ReadBack(e.to_string()).into()
}

impl Exchange for Staged {
    fn start(&mut self, sends: &[Part<'_>], receives: &[Part<'_>]) -> Result<u64> {
        let ticket = self.next;
        self.next += 1;
        if sends.len() + receives.len() > 0 {
            self.left.insert(ticket, sends.len() + receives.len());
        }
        for part in receives {
            let bytes = part.bytes.end - part.bytes.start;
            let staging = self.staging(bytes, true);
            let view = staging.buffer.get_mapped_range_mut(..bytes).map_err(mapping)?;
            let transfer = self.world.wire().receive(Memory::Write(view), part.rank, part.tag)?;
            let (to, range) = (part.buffer.clone(), part.bytes.clone());
            self.under_way.push((ticket, Message::Received { staging, transfer, to, range }));
        }
        if sends.is_empty() {
            return Ok(ticket);
        }
        let mut encoder = self.device.create_command_encoder(&Default::default());
        let mut copied = vec![];
        for part in sends {
            let bytes = part.bytes.end - part.bytes.start;
            let staging = self.staging(bytes, false);
            let start = part.bytes.start;
            encoder.copy_buffer_to_buffer(part.buffer, start, &staging.buffer, 0, bytes);
            copied.push((staging, bytes, part.rank, part.tag));
        }
        self.queue.submit([encoder.finish()]);
        for (staging, bytes, rank, tag) in copied {
            staging.map(wgpu::MapMode::Read);
            self.under_way.push((ticket, Message::Copied { staging, bytes, rank, tag }));
        }
        Ok(ticket)
    }

    fn poll(&mut self) -> Result<bool> {
        let poll = self.device.poll(wgpu::PollType::Poll);
        poll.map_err(|e| wgmoe::Error::Device(e.to_string()))?;
        let mut progress = false;
        for (ticket, message) in std::mem::take(&mut self.under_way) {
            let (rest, moved) = self.advance(message)?;
            progress |= moved;
            match rest {
                Some(message) => self.under_way.push((ticket, message)),
                None => {
                    let left = self.left.entry(ticket).or_insert(1);
                    *left -= 1;
                    if *left == 0 {
                        self.left.remove(&ticket);
                    }
                }
            }
        }
        Ok(progress)
    }

    fn done(&self, ticket: u64) -> bool {
        !self.left.contains_key(&ticket)
    }

    fn ranks(&self) -> Vec<usize> {
        let rank = |message: &Message| match message {
            Message::Copied { .. } => None,
            Message::Sent { transfer, .. } | Message::Received { transfer, .. } => {
                Some(transfer.rank)
            }
        };
        self.under_way.iter().filter_map(|(_, message)| rank(message)).collect()
    }
}
