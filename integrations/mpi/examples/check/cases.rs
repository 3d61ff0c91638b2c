//! Layers and batches that the ranks run.
use testkit::cases::random;
use testkit::layer::HostLayer;
use wgmoe_mpi::wgmoe::layer::LayerConfig;
use wgmoe_mpi::wgmoe::routing::{
    BlockRule, ExpertChoice, Normalise, Score, SequenceTop, TokenChoice,
};
use wgmoe_mpi::wgmoe::{Activation, Routing, WeightType};

/// A layer, its batch, and how it is split.
pub struct Case {
    pub name: String,
    pub layer: HostLayer,
    pub weight_type: WeightType,
    /// Tokens of each rank.
    pub tokens: Vec<u32>,
    /// Experts of each rank.
    pub experts: Vec<u32>,
    pub add: bool,
    /// Whether ranks name sequences of at most so many tokens each.
    pub sequences: Option<u32>,
    /// Whether a part of each sequence is padding, and capacities differ.
    pub ragged: bool,
    /// Blocks of at most so many tokens each.
    pub blocks: Option<u32>,
    pub chunk_rows: u32,
}

impl Case {
    /// `[T, D]` of all ranks.
    pub fn hidden(&self) -> Vec<f32> {
        random(3, (self.tokens.iter().sum::<u32>() * self.layer.config.hidden) as usize)
    }

    /// Ends of a rank's ranges of at most `most` tokens, from 0 on.
    pub fn ranges(tokens: u32, most: u32) -> Vec<u32> {
        (0..=tokens.div_ceil(most).max(1)).map(|i| (i * most).min(tokens)).collect()
    }

    /// Padding and capacities of a rank's sequences.
    pub fn lengths(&self, offsets: &[u32]) -> Option<Vec<u32>> {
        let of = |(i, w): (usize, &[u32])| (w[1] - w[0]).saturating_sub(i as u32 % 3 * 2);
        self.ragged.then(|| offsets.windows(2).enumerate().map(of).collect())
    }

    /// Capacities by the place of a sequence, under expert choice.
    pub fn capacities(&self, offsets: &[u32]) -> Option<Vec<u32>> {
        let expert_choice = matches!(self.layer.config.routing, Routing::ExpertChoice(_));
        let of = |(i, w): (usize, &[u32])| (w[1] - w[0]) / 4 + i as u32 % 2;
        let all = || offsets.windows(2).enumerate().map(of).collect();
        (self.ragged && expert_choice).then(all)
    }
}

/// How tokens of a batch, or experts, lie on ranks: evenly, by shares that differ, or all on the last
/// rank but a few.
fn shares(all: u32, ranks: usize, how: usize) -> Vec<u32> {
    let weight = |r: usize| match how % 4 {
        0 => 1,
        1 => (r as u32 * 7 + 3) % 5,
        2 => u32::from(r + 1 == ranks) * 20 + 1,
        _ => u32::from(r == 0),
    };
    let weights: Vec<u32> = (0..ranks).map(weight).collect();
    let sum: u32 = weights.iter().sum();
    let mut counts: Vec<u32> = weights.iter().map(|w| all * w / sum).collect();
    // What is left goes to the ranks that have some.
    let mut left = all - counts.iter().sum::<u32>();
    let some: Vec<usize> = (0..ranks).filter(|r| weights[*r] > 0).collect();
    for r in some.iter().cycle() {
        if left == 0 {
            break;
        }
        counts[*r] += 1;
        left -= 1;
    }
    counts
}

/// The rules, with sequences and blocks as they need them.
fn rules() -> Vec<(&'static str, Routing, [Option<u32>; 2], bool)> {
    let tokens = TokenChoice::new(2);
    let sigmoid = tokens.with_score(Score::Sigmoid).with_scale(2.5);
    let before = ExpertChoice::new(2).with_normalise(Normalise::BeforeSelection);
    let none = [None, None];
    vec![
        ("token choice", tokens.into(), none, false),
        ("token choice, sigmoid", sigmoid.into(), none, false),
        ("token choice, padding", tokens.into(), [Some(23), None], true),
        ("capacity 1.25", tokens.with_capacity_factor(1.25).into(), none, false),
        ("capacity 0.5, padding", tokens.with_capacity_factor(0.5).into(), [Some(23), None], true),
        ("expert choice, batch", ExpertChoice::new(2).into(), none, false),
        ("expert choice, batch, by scores", before.into(), none, false),
        ("expert choice, sequences", ExpertChoice::new(2).into(), [Some(17), None], false),
        ("expert choice, dynamic", ExpertChoice::new(2).with_max(5).into(), [Some(29), None], true),
        (
            "dMoE",
            sigmoid.with_coreset(BlockRule::mass(0.6).with_floor(2)).into(),
            [None, Some(8)],
            false,
        ),
        ("sequence top", SequenceTop::new(2).into(), [Some(40), None], false),
    ]
}

/// Every case for so many ranks. Sizes reach both matmuls' items on each kind of device: an expert's
/// rest of few rows, of many, and whole tiles; batches that end in few tokens and in many.
pub fn all(ranks: usize) -> Vec<Case> {
    let mut cases = vec![];
    for (i, (name, routing, [sequences, blocks], ragged)) in rules().into_iter().enumerate() {
        for (j, (tokens, experts)) in [(197, 5), (132, 9), (7, 5), (30, 9)].into_iter().enumerate()
        {
            let how = i + j;
            let mut config = LayerConfig::new(64, 40, experts, routing);
            config.shared_experts = [0, 1, 2][how % 3];
            if how % 4 == 1 {
                config = config.with_activation(Activation::Gelu);
            }
            let mut layer = HostLayer::new(config);
            if how % 2 == 0 {
                layer = layer.with_bias();
            }
            cases.push(Case {
                name: format!("{name}, {tokens} tokens, {experts} experts"),
                layer,
                weight_type: [WeightType::F32, WeightType::Bf16, WeightType::Q8_0][how % 3],
                tokens: shares(tokens, ranks, how),
                experts: shares(experts, ranks, [0, 0, 1, 3, 2][(i + 2 * j) % 5]),
                add: how % 2 == 1,
                sequences,
                ragged,
                blocks,
                chunk_rows: [1, 64, 100, 1024][how % 4],
            });
        }
    }
    cases
}
