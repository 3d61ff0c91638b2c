//! What training takes on the device, said before anything is made.
use super::MoeLayer;
use super::batch::BLOCK;
use crate::Result;
use crate::plan::{Stats, bits};
use crate::routing::Routing;

/// The sizes of a training step that memory hangs on.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct TrainingSizes {
    /// T: tokens.
    pub tokens: u32,
    /// Sequences, where the batch has some.
    pub sequences: Option<u32>,
    /// The batch's own bound of routed slots.
    pub routed_slots: Option<u32>,
    /// Whether the backward pass makes `z` again.
    pub recompute_z: bool,
}

impl TrainingSizes {
    /// A batch of so many tokens, one sequence, `z` kept.
    pub const fn new(tokens: u32) -> Self {
        Self { tokens, sequences: None, routed_slots: None, recompute_z: false }
    }

    /// So many sequences.
    #[must_use]
    pub const fn with_sequences(self, sequences: u32) -> Self {
        Self { sequences: Some(sequences), ..self }
    }

    /// An upper bound of the routed slots.
    #[must_use]
    pub const fn with_routed_slots(self, slots: u32) -> Self {
        Self { routed_slots: Some(slots), ..self }
    }

    /// `z` is made again.
    #[must_use]
    pub const fn with_recomputed_z(self) -> Self {
        Self { recompute_z: true, ..self }
    }
}

/// Bytes that training takes on the device, beside the caller's own slices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TrainingBytes {
    /// From the forward to the backward pass, of each layer.
    pub saved: u64,
    /// While either runs: layers that share a [`Scratch`](super::Scratch) share these.
    pub scratch: u64,
}

/// Names and bytes of tensors.
type Tensors = Vec<(&'static str, u64)>;

impl MoeLayer {
    /// Bytes that [`bind_training`](MoeLayer::bind_training) takes for batches of these sizes. Blocks are
    /// counted as those of 32 tokens that a batch has by default; a few words of offsets and capacities
    /// come on top.
    ///
    /// # Errors
    ///
    /// Zero tokens, or sizes that overflow ([`Error`](crate::Error)).
    pub fn training_bytes(&self, sizes: &TrainingSizes) -> Result<TrainingBytes> {
        let (saved, scratch) = self.training_tensors(sizes)?;
        // As buffers are rounded.
        let sum =
            |of: Tensors| of.into_iter().map(|(_, bytes)| bytes.max(16).next_multiple_of(16)).sum();
        Ok(TrainingBytes { saved: sum(saved), scratch: sum(scratch) })
    }

    /// The tensors that are saved, and those of scratch.
    pub(super) fn training_tensors(&self, sizes: &TrainingSizes) -> Result<(Tensors, Tensors)> {
        let config = self.config();
        let TrainingSizes { tokens, sequences, routed_slots, recompute_z } = *sizes;
        let shape = self.routing.plan_shape(tokens, sequences, routed_slots)?;
        let [t, e] = [tokens, config.experts].map(u64::from);
        let [d, f] = [config.hidden, config.intermediate].map(u64::from);
        let (pairs, slots) = (4 * t * e, u64::from(shape.slots()?));
        let bit_set = 4 * e * bits::columns(tokens as usize) as u64;
        let z = ("z", 8 * slots * f);
        let mut saved = vec![
            ("logits", pairs),
            ("plan", shape.bytes()?),
            ("assigned", bit_set),
            ("stats", Stats::bytes(config.experts)),
        ];
        let mut scratch = vec![
            ("gates", pairs),
            ("h", 4 * slots * f),
            ("y", 4 * slots * d),
            ("dz", 8 * slots * f),
            ("dgates", 4 * slots),
            ("dlogits", pairs),
            ("terms", 4 * (2 * t).max(e)),
        ];
        if self.routing.has_scores() {
            saved.push(("scores", pairs));
            scratch.push(("selection values", pairs));
        }
        if recompute_z { &mut scratch } else { &mut saved }.push(z);
        match config.routing {
            Routing::TokenChoice(rule) => {
                if rule.capacity_factor.is_some() {
                    saved.extend([("chosen", bit_set), ("dropped", 4 * e)]);
                }
                if rule.coreset.is_some() {
                    let blocks = u64::from(tokens.div_ceil(BLOCK));
                    let words = u64::from(config.experts.div_ceil(32));
                    scratch.extend([("coreset", 4 * blocks * words), ("block_of", 4 * t)]);
                }
            }
            Routing::ExpertChoice(_) | Routing::SequenceTop(_) => {}
        }
        Ok((saved, scratch))
    }
}
