//! Layers bound to a batch.
use crate::device::Tensor;
use crate::plan::Stats;
use crate::{BoundOp, Context, Dispatch, PlanShape, Result, Slice};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A layer bound to a batch. Recording it makes nothing; what the bound buffers hold is read when the
/// work runs.
#[derive(Clone, Debug)]
pub struct BoundLayer {
    parts: Vec<BoundOp>,
    stats: Tensor,
    routed: Option<Routed>,
    /// Set once the layer is recorded: what its backward pass waits for.
    recorded: Arc<AtomicBool>,
}

/// What the routing of a batch made, on the device.
#[derive(Clone, Debug)]
pub(crate) struct Routed {
    pub(crate) shape: PlanShape,
    pub(crate) plan: Tensor,
    pub(crate) assigned: Tensor,
    pub(crate) gates: Tensor,
    /// The bit set before a drop, kept where a backward pass needs it.
    pub(crate) chosen: Option<Tensor>,
    /// `[E]` u32: tokens that each expert dropped, kept with it.
    pub(crate) dropped: Option<Tensor>,
    /// Of a block-level rule.
    pub(crate) coreset: Option<Tensor>,
    /// Of a router of ours.
    pub(crate) selection: Option<Selection>,
}

/// What a choice was made from, each `[T, E]` f32.
#[derive(Clone, Debug)]
pub(crate) struct Selection {
    pub(crate) logits: Tensor,
    /// Scores, and the values that experts are chosen by. None where a rule needs only logits.
    pub(crate) scored: Option<(Tensor, Tensor)>,
}

impl Selection {
    pub(crate) fn scores(&self) -> &Tensor {
        self.scored.as_ref().map_or(&self.logits, |(scores, _)| scores)
    }

    pub(crate) fn values(&self) -> &Tensor {
        self.scored.as_ref().map_or(&self.logits, |(_, values)| values)
    }
}

impl BoundLayer {
    /// A layer of zero tokens: nothing to run, statistics of its own that say so.
    pub(crate) fn empty(ctx: &Context, experts: u32) -> Result<Self> {
        let words = vec![0u32; (Stats::bytes(experts) / 4) as usize];
        let stats = Tensor::new(ctx, "stats", &words)?;
        Ok(Self { parts: vec![], stats, routed: None, recorded: Arc::default() })
    }

    pub(crate) fn new(parts: Vec<BoundOp>, stats: Tensor, routed: Routed) -> Self {
        Self { parts, stats, routed: Some(routed), recorded: Arc::default() }
    }

    /// Adds what follows.
    pub(crate) fn extend(&mut self, parts: impl IntoIterator<Item = BoundOp>) {
        self.parts.extend(parts);
    }

    pub(crate) fn routed(&self) -> Option<&Routed> {
        self.routed.as_ref()
    }

    pub(crate) fn recorded(&self) -> &Arc<AtomicBool> {
        &self.recorded
    }

    /// Records the layer into a pass of the caller's.
    pub fn record(&self, pass: &mut wgpu::ComputePass<'_>) {
        self.recorded.store(true, Ordering::Relaxed);
        for part in &self.parts {
            part.record(pass);
        }
    }

    /// Records the layer as a pass of its own into `encoder`.
    pub fn encode(&self, encoder: &mut wgpu::CommandEncoder) {
        if !self.parts.is_empty() {
            let descriptor =
                wgpu::ComputePassDescriptor { label: Some("moe layer"), ..Default::default() };
            self.record(&mut encoder.begin_compute_pass(&descriptor));
        }
    }

    /// The dispatches, in order.
    pub fn dispatches(&self) -> impl Iterator<Item = &Dispatch> {
        self.parts.iter().flat_map(BoundOp::dispatches)
    }

    /// What the layer did, `[8 + E]` u32 ([`Stats::from_words`]); there after it ran.
    pub fn stats(&self) -> Slice<'_> {
        self.stats.slice()
    }

    /// The plan and its shape; none for zero tokens.
    pub fn plan(&self) -> Option<(PlanShape, Slice<'_>)> {
        self.routed.as_ref().map(|routed| (routed.shape, routed.plan.slice()))
    }

    /// The bit set `[E, ceil(T / 32)]` u32; none for zero tokens.
    pub fn assigned(&self) -> Option<Slice<'_>> {
        self.routed.as_ref().map(|routed| routed.assigned.slice())
    }

    /// Gates `[T, E]` f32, at assigned pairs; none for zero tokens.
    pub fn gates(&self) -> Option<Slice<'_>> {
        self.routed.as_ref().map(|routed| routed.gates.slice())
    }

    /// The coresets `[blocks, ceil(E / 32)]` u32 of a block-level rule.
    pub fn coreset(&self) -> Option<Slice<'_>> {
        self.routed.as_ref()?.coreset.as_ref().map(Tensor::slice)
    }

    /// Router logits `[T, E]` f32; none where another router chose.
    pub fn logits(&self) -> Option<Slice<'_>> {
        self.routed.as_ref()?.selection.as_ref().map(|s| s.logits.slice())
    }

    /// Scores `[T, E]` f32; none where the rule reads only logits.
    pub fn scores(&self) -> Option<Slice<'_>> {
        self.routed.as_ref()?.selection.as_ref()?.scored.as_ref().map(|(s, _)| s.slice())
    }

    /// The values `[T, E]` f32 that experts are chosen by: scores or logits with the bias. None where
    /// the rule chooses by the logits as they are.
    pub fn selection_values(&self) -> Option<Slice<'_>> {
        self.routed.as_ref()?.selection.as_ref()?.scored.as_ref().map(|(_, v)| v.slice())
    }
}
