//! Single ops on long batches of which few tokens are active: every loop of the choices over words and samples.
use super::{D, is_set};
use testkit::prelude::*;
use wgmoe::ops::{active_rows, capacity, combine, expert_choice, sequence_top};
use wgmoe::plan::{HostPlan, PlanShape, bits};
use wgmoe::reference;

const E: usize = 20;
const T: usize = 5000;
const OFFSETS: [u32; 4] = [0, 4500, 4510, T as u32];
const CAPACITY: [u32; 3] = [150, 3, 9];

/// One token in seven, and none of a stretch.
fn sparse() -> Vec<u32> {
    let mut words = vec![0u32; T.div_ceil(32)];
    for t in (0..T).filter(|t| t % 7 == 3 && !(1000..2500).contains(t)) {
        words[t / 32] |= 1 << (t % 32);
    }
    words
}

/// The active tokens, their values, and offsets of the sequences among them.
fn alone(rows: &[u32], values: &[f32]) -> (Vec<usize>, Vec<f32>, Vec<u32>) {
    let kept: Vec<usize> = (0..T).filter(|&t| is_set(rows, t)).collect();
    let of = kept.iter().flat_map(|&t| values[t * E..][..E].to_vec()).collect();
    let count = |end: u32| kept.partition_point(|&t| t < end as usize) as u32;
    let offsets = OFFSETS.map(count).to_vec();
    (kept, of, offsets)
}

/// A bit set of the kept tokens, put back where they lie.
fn back(kept: &[usize], assigned: &[u32]) -> Vec<u32> {
    let mut all = bits::empty(T, E);
    for (i, &t) in kept.iter().enumerate() {
        for e in bits::experts_of(assigned, kept.len(), i) {
            bits::set(&mut all, T, e, t);
        }
    }
    all
}

#[test]
fn choices_among_few_of_many() {
    let Some(gpu) = gpu() else { return };
    let rows = sparse();
    // Many ties beside values of their own.
    let values: Vec<f32> = random(1, T * E)
        .iter()
        .enumerate()
        .map(|(i, v)| if i % 3 == 0 { 0.25 } else { *v })
        .collect();
    let (kept, few, offsets) = alone(&rows, &values);
    let by_experts = expert_choice::cpu(&few, E, &offsets, None, &CAPACITY);
    let by_pairs = sequence_top::cpu(&few, E, 3, &offsets);
    let k = [2u32, 9, 1];
    let source = capacity::HostSource::ExpertsPerToken(&k);
    let (capacities, _) = capacity::cpu(source, kept.len(), E as u32, &offsets, None);
    for ctx in super::targets(&gpu) {
        let what = variant_name(&ctx);
        let values = gpu.upload(&values);
        let [rows, offsets, given, k] =
            [&rows[..], &OFFSETS, &CAPACITY, &k].map(|words| gpu.upload(words));
        let (tokens, experts, sequences) = (T as u32, E as u32, 3);
        let assigned = || Output::u32s(&gpu, E * bits::columns(T));

        let out = assigned();
        let args = expert_choice::Args {
            values: (&values).into(),
            offsets: (&offsets).into(),
            lengths: None,
            capacity: (&given).into(),
            assigned: out.slice(),
        };
        let dims = expert_choice::Dims { tokens, experts, sequences };
        let op = expert_choice::ExpertChoice::new(&ctx).unwrap();
        run(&gpu, &op.bind_active(&dims, args, (&rows).into()).unwrap());
        assert_same(&out.get::<u32>(&gpu), &back(&kept, &by_experts), &format!("{what}: experts"));

        let out = assigned();
        let (values, at) = ((&values).into(), (&offsets).into());
        let args = sequence_top::Args { values, offsets: at, assigned: out.slice() };
        let dims = sequence_top::Dims { tokens, experts, sequences, experts_per_token: 3 };
        let op = sequence_top::SequenceTop::new(&ctx).unwrap();
        run(&gpu, &op.bind_active(&dims, args, (&rows).into()).unwrap());
        assert_same(&out.get::<u32>(&gpu), &back(&kept, &by_pairs), &format!("{what}: pairs"));

        let [of, k_of] = [0; 2].map(|_| Output::u32s(&gpu, 3));
        let args = capacity::Args {
            source: capacity::Source::ExpertsPerToken((&k).into()),
            offsets: (&offsets).into(),
            lengths: None,
            capacity_of: of.slice(),
            k_of: k_of.slice(),
        };
        let dims = capacity::Dims { tokens, experts, sequences };
        let op = capacity::Capacity::new(&ctx).unwrap();
        run(&gpu, &op.bind_active(&dims, args, (&rows).into()).unwrap());
        assert_same(&of.get::<u32>(&gpu), &capacities, &format!("{what}: capacities"));
    }
}

#[test]
fn active_tokens_that_are_not_padding_are_counted() {
    let Some(gpu) = gpu() else { return };
    let (rows, lengths) = (sparse(), [4000u32, 99, 200]);
    let want = reference::active_rows_of(T, &OFFSETS, &lengths, &rows);
    let count: u32 = want.iter().map(|word| word.count_ones()).sum();
    let table: Vec<u32> = (0..=T as u32).map(|n| 3 * n + 7).collect();
    for ctx in super::targets(&gpu) {
        let [active, offsets, of_lengths, of] =
            [&rows[..], &OFFSETS, &lengths, &table].map(|words| gpu.upload(words));
        let (out, capacity) = (Output::u32s(&gpu, T.div_ceil(32)), Output::u32s(&gpu, 1));
        let capacities =
            active_rows::Capacities { capacity_of: (&of).into(), capacity: capacity.slice() };
        let args = active_rows::Args {
            offsets: (&offsets).into(),
            lengths: (&of_lengths).into(),
            rows: out.slice(),
            capacities: Some(capacities),
        };
        let dims = active_rows::Dims { tokens: T as u32, sequences: 3 };
        let op = active_rows::ActiveRows::new(&ctx).unwrap();
        run(&gpu, &op.bind_active(&dims, args, (&active).into()).unwrap());
        assert_same(&out.get::<u32>(&gpu), &want, "rows");
        assert_eq!(capacity.get::<u32>(&gpu), [3 * count + 7]);
    }
}

#[test]
fn combined_rows_are_the_twins() {
    let Some(gpu) = gpu() else { return };
    let tokens = 70;
    let lists: Vec<Vec<u32>> = (0..E as u32).map(|e| vec![e % 70, (e * 7 + 1) % 70]).collect();
    let assigned = bits::from_lists(tokens, &lists);
    let gates = random(2, tokens * E);
    let active = [0x5a5a_5a5a_u32, 0xffff_0000, 0x3f];
    let shape = PlanShape::on_host(70, E as u32, 2 * E as u32).with_shared_experts(1);
    let plan = HostPlan::cpu_active(&shape, &assigned, &gates, &active);
    let slots = shape.slots().unwrap() as usize;
    // Rows of which a workgroup takes a few, and of more than it takes.
    for d in [D, 4120] {
        let y = random(3, slots * d);
        let before = random(4, tokens * d);
        for ctx in super::targets(&gpu) {
            for add in [false, true] {
                let mut want = before.clone();
                reference::combine_active(&plan, &y, d, &active, add, &mut want);
                let out = Output::holding(&gpu, &before);
                let [y, words] =
                    [exact(&y), plan.to_words(&shape).unwrap()].map(|all| gpu.upload(&all));
                let bits_of = gpu.upload(&active);
                let args = combine::Args {
                    y: (&y).into(),
                    plan: (&words).into(),
                    out: out.slice().into(),
                    columns: 0..d as u32,
                    hidden: d as u32,
                    add,
                };
                let op = combine::Combine::new(&ctx).unwrap();
                run(&gpu, &op.bind_active(&shape, args, (&bits_of).into()).unwrap());
                let what = format!("D {d} add {add}");
                assert_close(&out.get::<f32>(&gpu), &want, 2e-5, 1e-5, &what);
            }
        }
    }
}
