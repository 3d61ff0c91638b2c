//! Expert choice through the whole layer: a batch of sequences of very different lengths,
//! capacities that change between two recordings, and a token-choice layer turned into an
//! expert-choice one.
use testkit::compare::largest;
use testkit::layer::HostLayer;
use testkit::prelude::{Output, assert_close, assert_same, gpu, random};
use wgmoe::layer::{
    Batch, BoundLayer, HostBatch, HostSequences, LayerConfig, MoeLayer, Sequences, cpu_routing,
};
use wgmoe::ops::expert_choice::ranges;
use wgmoe::plan::Stats;
use wgmoe::plan::bits;
use wgmoe::report::Report;
use wgmoe::routing::GateRule;
use wgmoe::routing::schedule::{capacity, slot_bound};
use wgmoe::routing::{ExpertChoice, Routing, TokenChoice};
use wgmoe::{Context, Gpu, Slice, Variant, WeightType, wgpu};

const D: usize = 32;
const F: usize = 16;
const E: usize = 8;

/// Token ranges of 1, 7, 512 and 513 tokens and two more, some of whose tokens are padding.
const SPANS: [u32; 6] = [1, 7, 512, 513, 20, 3];
const LENGTHS: [u32; 6] = [1, 5, 500, 513, 0, 1];
/// Experts per token of each sequence: little, uneven, more than there are.
const K: [[u32; 6]; 2] = [[1, 2, 1, 3, 2, 4], [8, 4, 3, 1, 8, 1000]];
const K_MAX: u32 = 8;

fn offsets() -> Vec<u32> {
    let sums = SPANS.iter().scan(0, |sum, n| {
        *sum += n;
        Some(*sum)
    });
    std::iter::once(0).chain(sums).collect()
}

fn capacities(k: [u32; 6]) -> Vec<u32> {
    LENGTHS.iter().zip(k).map(|(&n, k)| capacity(n, k, E as u32)).collect()
}

/// Tokens that are no sequence's.
fn padding() -> Vec<usize> {
    let tokens = offsets()[SPANS.len()] as usize;
    let of = ranges(&offsets(), tokens).into_iter().zip(LENGTHS);
    of.flat_map(|(range, n)| range.start + n as usize..range.end).collect()
}

const EXPERT_CHOICE: Routing = Routing::ExpertChoice(ExpertChoice::new(2).with_max(K_MAX));

const TOKEN_CHOICE: Routing =
    Routing::TokenChoice(TokenChoice::new(2).with_gate(GateRule::Softmax));

/// A layer, and the same on the host.
struct Case {
    layer: MoeLayer,
    host: HostLayer,
}

impl Case {
    fn new(gpu: &Gpu, ctx: &Context, shared_experts: u32, routing: Routing) -> Self {
        let config = LayerConfig::new(D as u32, F as u32, E as u32, routing)
            .with_shared_experts(shared_experts);
        let host = HostLayer::new(config);
        // Two experts a page.
        let limit = 2 * (F.next_multiple_of(32) * D * 4) as u64;
        let layer = host.layer_as(ctx, &gpu.queue, WeightType::F32, Some(limit)).unwrap();
        Self { layer, host }
    }

    /// What `config` make of `x`, from the device's own logits: the bits, and the output.
    fn twin(
        &self,
        config: &LayerConfig,
        x: &[f32],
        selection: [&[f32]; 3],
        sequences: Option<HostSequences<'_>>,
    ) -> (Vec<u32>, Vec<f32>) {
        let batch = HostBatch { sequences, ..HostBatch::default() };
        let want = cpu_routing(config, &self.host.host_router(), batch, selection);
        let out = self.host.outputs(x, &want.assigned, &want.gates);
        (want.assigned, out)
    }
}

/// A tensor of a step, as long as it is.
fn get<T: bytemuck::Pod>(gpu: &Gpu, slice: Slice<'_>) -> Vec<T> {
    let size = slice.size as usize / std::mem::size_of::<T>();
    gpu.download::<T>(slice.buffer).unwrap()[..size].to_vec()
}

fn copy(encoder: &mut wgpu::CommandEncoder, from: Slice<'_>, to: Slice<'_>) {
    encoder.copy_buffer_to_buffer(from.buffer, from.offset, to.buffer, to.offset, from.size);
}

/// Buffers, bind groups, pipelines and shader modules of a device.
fn objects(gpu: &Gpu) -> [isize; 4] {
    let hal = gpu.device.get_internal_counters().hal;
    [
        hal.buffers.read(),
        hal.bind_groups.read(),
        hal.compute_pipelines.read(),
        hal.shader_modules.read(),
    ]
}

fn run(gpu: &Gpu, step: &BoundLayer) {
    let mut encoder = gpu.device.create_command_encoder(&Default::default());
    step.encode(&mut encoder);
    gpu.queue.submit([encoder.finish()]);
    gpu.wait().unwrap();
}

/// One bound step, recorded twice into one submission, with other capacities in its buffer the
/// second time.
#[test]
fn capacities_change_between_records_of_one_step() {
    // A device of its own: what other tests make would be counted too.
    let Some(Ok(gpu)) = gpu().map(|_| Gpu::new()) else { return };
    let offsets = offsets();
    let tokens = offsets[SPANS.len()];
    let n = tokens as usize;
    let x = random(3, n * D);
    for variant in Variant::all(&gpu.device) {
        let ctx = Context::with_variant(&gpu.device, variant).unwrap();
        for shared in [1, 0] {
            let case = Case::new(&gpu, &ctx, shared, EXPERT_CHOICE);
            let hidden = gpu.upload(&x);
            let out = Output::f32s(&gpu, n * D);
            let capacity = Output::u32s(&gpu, SPANS.len());
            let lengths = gpu.upload(&LENGTHS);
            let offset_buffer = gpu.upload(&offsets);
            let mut batch = Batch::new(&hidden, tokens).into_out(out.slice());
            batch.sequences = Some(
                Sequences::new(SPANS.len() as u32, &offset_buffer)
                    .with_lengths(&lengths)
                    .with_capacity(capacity.slice()),
            );
            batch.routed_slots = Some(slot_bound(LENGTHS, E as u32, K_MAX).unwrap());
            let step = case.layer.bind(&batch).unwrap();
            let given = K.map(|k| gpu.upload(&capacities(k)));
            let words = bits::empty(n, E).len();
            let log = [0; 2].map(|_| {
                [Output::f32s(&gpu, n * D), Output::u32s(&gpu, words), Output::u32s(&gpu, 8 + E)]
            });

            let made = (objects(&gpu), ctx.pipelines());
            let mut encoder = gpu.device.create_command_encoder(&Default::default());
            for (given, [out_log, bit_log, stat_log]) in given.iter().zip(&log) {
                copy(&mut encoder, given.into(), capacity.slice());
                step.encode(&mut encoder);
                copy(&mut encoder, out.slice(), out_log.slice());
                copy(&mut encoder, step.assigned().unwrap(), bit_log.slice());
                copy(&mut encoder, step.stats(), stat_log.slice());
            }
            assert_eq!((objects(&gpu), ctx.pipelines()), made, "recording makes nothing");
            assert!(made.0.iter().all(|&n| n > 0), "the counters count: {made:?}");
            gpu.queue.submit([encoder.finish()]);
            gpu.wait().unwrap();

            let [logits, s, r] =
                testkit::layer::selection(&step).unwrap().map(|t| get::<f32>(&gpu, t));
            let mut results = vec![];
            for (k, [out_log, bit_log, stat_log]) in K.into_iter().zip(&log) {
                let what = format!("{variant:?}, {shared} shared, k {k:?}");
                let capacity = capacities(k);
                let sequences = HostSequences {
                    offsets: &offsets,
                    lengths: Some(&LENGTHS),
                    capacity: Some(&capacity),
                };
                let config = case.layer.config();
                let (want_bits, want) = case.twin(config, &x, [&logits, &s, &r], Some(sequences));
                let got_bits: Vec<u32> = bit_log.get(&gpu);
                let got: Vec<f32> = out_log.get(&gpu);
                assert_same(&got_bits, &want_bits, &what);
                assert_close(&got, &want, 2e-5 * largest(&want), 1e-4, &what);

                // Every expert has what the schedule says, and no padding.
                let stats = Stats::from_words(&stat_log.get::<u32>(&gpu)).unwrap();
                let each: u32 = capacity.iter().sum();
                assert_eq!(stats.tokens_per_expert, [each; E], "{what}");
                assert_eq!((stats.slots, stats.ignored), (each * E as u32, 0), "{what}");
                let padding = padding();
                assert_eq!(padding.len(), 36);
                for &t in &padding {
                    assert!(bits::experts_of(&got_bits, n, t).is_empty(), "{what}: token {t}");
                    let row = &got[t * D..][..D];
                    // Shared experts know nothing of padding.
                    assert_eq!(row.iter().all(|&v| v == 0.0), shared == 0, "{what}: token {t}");
                }
                let report = Report::new(&stats, tokens).with_padding(padding.len() as u32);
                assert_eq!((report.tokens, report.load.imbalance()), (tokens - 36, 1.0), "{what}");
                let untouched = (0..n).filter(|&t| bits::experts_of(&got_bits, n, t).is_empty());
                assert_eq!(report.untouched as usize, untouched.count() - 36, "{what}");
                results.push((got_bits, got));
            }
            assert!(results[0].0 != results[1].0 && results[0].1 != results[1].1, "{variant:?}");
        }
    }
}

/// A token-choice layer under expert choice: the same pages, the twin's result.
#[test]
fn another_rule_shares_the_pages() {
    let Some(Ok(gpu)) = gpu().map(|_| Gpu::new()) else { return };
    let n = 70;
    let x = random(4, n * D);
    for variant in Variant::all(&gpu.device) {
        let ctx = Context::with_variant(&gpu.device, variant).unwrap();
        let mut case = Case::new(&gpu, &ctx, 1, TOKEN_CHOICE);
        // Staging buffers, and those that only probe the device, go when it has nothing left to do.
        let counters = || {
            gpu.queue.submit([]);
            gpu.device.poll(wgpu::PollType::wait_indefinitely()).unwrap();
            gpu.device.get_internal_counters().hal
        };
        let before = counters();
        let retrofit = case.layer.with_routing(EXPERT_CHOICE).unwrap();
        let after = counters();
        assert!(before.buffers.read() > 0 && before.buffer_memory.read() > 0);
        assert_eq!(after.buffers.read(), before.buffers.read(), "no buffer is made");
        assert_eq!(after.buffer_memory.read(), before.buffer_memory.read());
        assert_eq!(retrofit.weights().bytes(), case.layer.weights().bytes());
        assert_eq!(retrofit.weights().page_counts(), case.layer.weights().page_counts());
        assert_eq!(retrofit.config(), &case.layer.config().with_routing(EXPERT_CHOICE));

        // What is written through the one, the other reads.
        case.host.experts = HostLayer::seeded(&case.host.config, 900);
        case.host.write(&gpu.queue, case.layer.weights()).unwrap();
        let hidden = gpu.upload(&x);
        for layer in [&case.layer, &retrofit] {
            let what = format!("{variant:?}, {:?}", layer.config().routing);
            let out = Output::f32s(&gpu, n * D);
            let step = layer.bind(&Batch::new(&hidden, n as u32).into_out(out.slice())).unwrap();
            run(&gpu, &step);
            let [logits, s, r] =
                testkit::layer::selection(&step).unwrap().map(|t| get::<f32>(&gpu, t));
            let (want_bits, want) = case.twin(layer.config(), &x, [&logits, &s, &r], None);
            let got: Vec<u32> = get(&gpu, step.assigned().unwrap());
            assert_same(&got, &want_bits, &what);
            assert_close(&out.get::<f32>(&gpu), &want, 2e-5 * largest(&want), 1e-4, &what);
        }
    }
}
