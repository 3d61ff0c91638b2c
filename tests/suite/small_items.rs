//! Small items: what an expert has left of 9 to 32 rows, in a kernel of their own. Software drivers leave
//! them out, for the time they take to compile it; here the context asks for them.
use testkit::compare::{close, exact, largest};
use testkit::device::context_of;
use testkit::layer::stored;
use testkit::prelude::{Output, gpu, random, run};
use testkit::works::{Planned, plan};
use wgmoe::ops::grouped_matmul::{
    Args, GroupedMatmul, Rows, SlotRows, Stage, activate, cpu_row, few_rows,
};
use wgmoe::ops::logits::{self, Logits};
use wgmoe::plan::{HostPlan, bits};
use wgmoe::weights::{ExpertShape, HostWeights, Projection};
use wgmoe::{
    Activation, BoundOp, Context, ExpertWeights, Gpu, PlanShape, Target, TileShape, Variant,
    WeightType, wgpu,
};

/// Tokens of each expert: each number that makes a skinny or a small item, and tiles with every kind of rest.
const ROWS: [usize; 44] = {
    let more = [40, 48, 56, 63, 64, 65, 73, 80, 97, 100];
    let mut rows = [0; 44];
    let mut e = 0;
    while e < rows.len() {
        rows[e] = if e < 34 { e } else { more[e - 34] };
        e += 1;
    }
    rows
};
const TOKENS: usize = 100;
const EXPERTS: usize = ROWS.len();
/// Depths of more than two steps, of fours (gate and up) and not (down).
const HIDDEN: u32 = 300;
const INTERMEDIATE: u32 = 299;

fn with_small_items(gpu: &Gpu) -> Context {
    let tile = Variant::best(&gpu.device).tile;
    context_of(gpu, Variant { tile, small_items: true, ..Variant::PORTABLE })
}

fn is_software(gpu: &Gpu) -> bool {
    gpu.info.device_type == wgpu::DeviceType::Cpu
}

/// Whether to run what takes software drivers minutes to compile.
fn all_types(gpu: &Gpu) -> bool {
    let all = !is_software(gpu) || std::env::var_os("WGMOE_SMALL_ITEMS").is_some();
    if !all {
        eprintln!("not run: small items but those of experts in f32, without WGMOE_SMALL_ITEMS=1");
    }
    all
}

/// The tokens of each expert, spread over all.
fn assigned() -> Vec<u32> {
    let mut words = bits::empty(TOKENS, EXPERTS);
    for (e, rows) in ROWS.into_iter().enumerate() {
        for i in 0..rows {
            bits::set(&mut words, TOKENS, e, (e * 7 + i * 3) % TOKENS);
        }
    }
    words
}

/// One stage of experts that are all alike, so that a token's row is the same in each.
struct Case<'a> {
    gpu: &'a Gpu,
    ctx: &'a Context,
    made: &'a Planned,
    weight_type: WeightType,
    stage: Stage,
    /// Gate, up, down.
    matrices: [Vec<f32>; 3],
    /// A row a token (gate and up), or a slot.
    x: wgpu::Buffer,
    /// The output of each token.
    want: Vec<Vec<f32>>,
}

impl<'a> Case<'a> {
    fn new(
        gpu: &'a Gpu,
        ctx: &'a Context,
        made: &'a Planned,
        weight_type: WeightType,
        stage: Stage,
    ) -> Self {
        let size = (HIDDEN * INTERMEDIATE) as usize;
        let matrices = [1, 2, 3].map(|seed| random(seed, size));
        let [gate, up, down] = [0, 1, 2]
            .map(|i| stored(&matrices[i], if i == 2 { INTERMEDIATE } else { HIDDEN }, weight_type));
        let depth = if stage == Stage::Down { INTERMEDIATE } else { HIDDEN } as usize;
        let rows = random(77, TOKENS * depth);
        let twin = |x: &[f32]| -> Vec<f32> {
            let product = |w: &[f32]| cpu_row(x, &|i| w[i], w.len() / depth);
            match stage {
                Stage::GateUp(by) => {
                    let both = product(&gate).into_iter().zip(product(&up));
                    both.map(|(gate, up)| activate(by, gate, up) as f32).collect()
                }
                _ => product(&down).into_iter().map(|v| v as f32).collect(),
            }
        };
        let want = rows.chunks(depth).map(twin).collect();
        let of_slots = || -> Vec<f32> {
            let tokens = made.host.token_of.iter().map(|&t| t as usize);
            tokens.flat_map(|t| &rows[t * depth..][..depth]).copied().collect()
        };
        let x = if stage == Stage::Down { gpu.upload(&of_slots()) } else { gpu.upload(&rows) };
        Self { gpu, ctx, made, weight_type, stage, matrices, x, want }
    }

    fn weights(&self, experts: u32, page_limit: u64) -> ExpertWeights {
        let shape = ExpertShape::new(experts, HIDDEN, INTERMEDIATE, self.weight_type);
        let weights = ExpertWeights::with_page_limit(self.ctx, shape, page_limit).unwrap();
        for e in 0..experts {
            for (p, values) in Projection::ALL.into_iter().zip(&self.matrices) {
                weights.write(&self.gpu.queue, e, p, HostWeights::F32(values)).unwrap();
            }
        }
        weights
    }

    /// Some slots' rows.
    fn bind(
        &self,
        weights: &ExpertWeights,
        places: Option<&wgpu::Buffer>,
        out: &Output,
        slots: std::ops::Range<u32>,
    ) -> BoundOp {
        let x = match self.stage {
            Stage::Down => Rows::Slots(SlotRows::from(&self.x)),
            _ => Rows::Tokens((&self.x).into()),
        };
        let args = Args {
            x,
            plan: (&self.made.plan).into(),
            weights,
            places: places.map(Into::into),
            out: out.slice().into(),
            slots,
            columns: 0..self.columns() as u32,
        };
        let op = GroupedMatmul::new(self.ctx, &weights.shape(), self.stage).unwrap();
        op.bind(&self.made.shape, args).unwrap()
    }

    fn columns(&self) -> usize {
        self.want[0].len()
    }

    /// Rows of a slot's expert that no whole tile holds and this slot is one of; past all where one does.
    fn left(&self, slot: usize) -> usize {
        let offsets = &self.made.host.expert_offsets;
        let e = offsets.partition_point(|&first| first as usize <= slot) - 1;
        let (rows, at) = ((offsets[e + 1] - offsets[e]) as usize, slot - offsets[e] as usize);
        let tile_rows = self.made.shape.tile_rows as usize;
        let rest = rows % tile_rows;
        if at < rows - rest { usize::MAX } else { rest }
    }

    fn check(&self) {
        let columns = self.columns();
        let slots = self.made.host.token_of.len();
        let what = format!("{:?} {:?}", self.weight_type, self.stage);
        // One expert stands for all. One kind of item after the other: each leaves the others' rows alone.
        let out = Output::f32s(self.gpu, slots * columns);
        let places = self.gpu.upload(&[0u32; EXPERTS]);
        let weights = self.weights(1, u64::MAX);
        let step = self.bind(&weights, Some(&places), &out, 0..slots as u32);
        for (kind, most) in [("skinny", 8), ("small", 32), ("tile", usize::MAX)] {
            let of_kind = |d: &&wgmoe::Dispatch| d.label().contains(&format!("{kind} items"));
            let mine: Vec<_> = step.dispatches().iter().filter(of_kind).collect();
            assert_eq!(mine.len(), 1, "{what}: {kind}");
            run(self.gpu, &mine[0].clone().into());
            for (s, row) in out.get::<f32>(self.gpu).chunks(columns).enumerate() {
                let is_there = self.left(s) <= most;
                let as_it_was = row.iter().all(|v| v.is_nan());
                assert!(is_there || as_it_was, "{what}, {kind}: slot {s} was written");
                if is_there {
                    let want = &self.want[self.made.host.token_of[s] as usize];
                    let what = format!("{what}, {kind}: slot {s}");
                    close(row, want, 2e-5 * largest(want), 2e-5, &what).unwrap();
                }
            }
        }

        // Bits hang on the order of the sum: that of up to 32 rows, or that of tiles.
        let got: Vec<f32> = out.get(self.gpu);
        let mut first: [Vec<Option<Vec<u32>>>; 2] = [vec![None; TOKENS], vec![None; TOKENS]];
        for (s, row) in got.chunks(columns).enumerate() {
            let token = self.made.host.token_of[s] as usize;
            let kind = &mut first[usize::from(self.left(s) > 32)][token];
            let same = *kind.get_or_insert_with(|| exact(row)) == exact(row);
            assert!(same, "{what}: slot {s} of token {token} has other bits");
        }

        // Pages of some experts; some slots after the other.
        let all = ExpertShape::new(EXPERTS as u32, HIDDEN, INTERMEDIATE, self.weight_type);
        let weights = self.weights(EXPERTS as u32, all.device_bytes() / 4);
        assert!(weights.page_counts().iter().all(|&n| n > 1), "{what}: one page");
        let out = Output::f32s(self.gpu, slots * columns);
        for window in [0..777, 777..778, 778..slots as u32] {
            run(self.gpu, &self.bind(&weights, None, &out, window));
        }
        for (s, row) in out.get::<f32>(self.gpu).chunks(columns).enumerate() {
            let before = &got[s * columns..][..columns];
            assert_eq!(exact(row), exact(before), "{what}: slot {s} in pages and windows");
        }
    }
}

#[test]
fn rows_of_any_item_have_the_same_bits() {
    let Some(gpu) = gpu() else { return };
    let ctx = with_small_items(&gpu);
    let scores = random(5, TOKENS * EXPERTS);
    let shape = [TOKENS as u32, EXPERTS as u32];
    let made = plan(&gpu, &ctx, shape, &scores, &assigned()).unwrap();
    let gated = Stage::GateUp(Activation::Silu);
    for stage in [gated, Stage::Down] {
        Case::new(&gpu, &ctx, &made, WeightType::F32, stage).check();
    }
    if all_types(&gpu) {
        for &weight_type in WeightType::ALL.iter().filter(|t| **t != WeightType::F32) {
            Case::new(&gpu, &ctx, &made, weight_type, gated).check();
        }
    }
}

/// What a caller asks for who wants one order of the sums in all rows.
#[test]
fn without_skinny_items_all_rows_are_in_tiles() {
    let Some(gpu) = gpu() else { return };
    let ctx = with_small_items(&gpu);
    let size = [TOKENS as u32, EXPERTS as u32];
    let shape = PlanShape::new(&ctx, size[0], size[1], ROWS.iter().sum::<usize>() as u32);
    assert_eq!(few_rows(&ctx, &shape), 32.min(shape.tile_rows - 1));
    let shape = shape.with_item_rows(shape.tile_rows, 0);
    assert_eq!(few_rows(&ctx, &shape), 0);
    let host = HostPlan::cpu(&shape, &assigned(), &vec![1.0; TOKENS * EXPERTS]);
    let plan = gpu.upload(&host.to_words(&shape).unwrap());
    let made = Planned { shape, plan, step: BoundOp::default(), host };
    for stage in [Stage::GateUp(Activation::Silu), Stage::Down] {
        let case = Case::new(&gpu, &ctx, &made, WeightType::F32, stage);
        let slots = made.host.token_of.len();
        let out = Output::f32s(&gpu, slots * case.columns());
        let places = gpu.upload(&[0u32; EXPERTS]);
        let step = case.bind(&case.weights(1, u64::MAX), Some(&places), &out, 0..slots as u32);
        assert!(step.dispatches().iter().all(|d| !d.label().contains("small")), "small items");
        run(&gpu, &step);
        let mut first: Vec<Option<Vec<u32>>> = vec![None; TOKENS];
        for (row, &token) in out.get::<f32>(&gpu).chunks(case.columns()).zip(&made.host.token_of) {
            let want = &case.want[token as usize];
            let what = format!("{stage:?}, token {token}");
            close(row, want, 2e-5 * largest(want), 2e-5, &what).unwrap();
            let same = *first[token as usize].get_or_insert_with(|| exact(row)) == exact(row);
            assert!(same, "{what} has other bits in another item");
        }
    }
}

#[test]
fn logits_of_few_tokens() {
    let Some(gpu) = gpu() else { return };
    if !all_types(&gpu) {
        return;
    }
    let ctx = with_small_items(&gpu);
    let (hidden, experts) = (300, 40);
    let router = random(8, (experts * hidden) as usize);
    let weights = gpu.upload(&router);
    let op = Logits::new(&ctx, hidden, experts).unwrap();
    let mut first: Option<Vec<f32>> = None;
    for tokens in [1, 5, 8, 9, 11, 16, 17, 31, 32, 33] {
        let x = random(9, (tokens * hidden) as usize);
        let out = Output::f32s(&gpu, (tokens * experts) as usize);
        let x_in = gpu.upload(&x);
        let args =
            logits::Args { x: (&x_in).into(), weights: (&weights).into(), logits: out.slice() };
        run(&gpu, &op.bind(&logits::Dims { tokens }, args).unwrap());
        let got: Vec<f32> = out.get(&gpu);
        let want = logits::cpu(&x, &router, hidden as usize);
        close(&got, &want, 2e-5 * largest(&want), 2e-5, &format!("{tokens} tokens")).unwrap();
        if tokens <= 32 {
            let row = got[..experts as usize].to_vec();
            assert_eq!(*first.get_or_insert_with(|| row.clone()), row, "{tokens} tokens");
        }
    }
}

/// Software drivers compile none of them unasked; of other devices `tune` tries the layer without.
#[test]
fn software_drivers_leave_them_out() {
    let Some(gpu) = gpu() else { return };
    let all = Variant::all(&gpu.device);
    let without = all.iter().filter(|v| !v.small_items).count();
    let expected = if is_software(&gpu) { all.len() } else { 1 };
    assert_eq!(without, expected, "{all:?}");
    assert_eq!(Variant::best(&gpu.device).small_items, !is_software(&gpu));
    // One that was kept before there were any has none.
    let kept: Variant = serde_json::from_str(r#"{"target":"Wide","subgroups":true}"#).unwrap();
    let want = Variant {
        target: Target::Wide,
        subgroups: true,
        matrix: false,
        tile: TileShape::Large,
        small_items: false,
    };
    assert_eq!(kept, want);
}
