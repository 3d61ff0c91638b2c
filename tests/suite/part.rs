//! A batch in parts, as several devices have it: the bits of the whole, and the experts' choice between
//! the halves of a routing. Plans that the host makes.
use testkit::cases::random;
use testkit::compare::{assert_same, exact};
use testkit::device::{contexts, gpu};
use testkit::layer::HostLayer;
use wgmoe::layer::{Batch, BoundLayer, LayerConfig, MoeRouting, Sequences};
use wgmoe::ops::{expert_choice, grouped_matmul};
use wgmoe::plan::{HostPlan, PlanShape, bits};
use wgmoe::routing::{ExpertChoice, Score, TokenChoice, schedule};
use wgmoe::{Context, Error, Gpu, Routing, Slice, WeightType};

const HIDDEN: u32 = 72;
const EXPERTS: u32 = 9;

/// Batches in parts: of one kernel's sizes and of the other's, and plans of one dispatch and of three.
const PARTS: [&[u32]; 5] = [&[4, 5], &[3, 59, 8], &[35, 5], &[2, 3], &[1, 96, 40]];

fn host(routing: impl Into<Routing>) -> HostLayer {
    HostLayer::new(LayerConfig::new(HIDDEN, 32, EXPERTS, routing)).with_bias()
}

fn routing(ctx: &Context, host: &HostLayer) -> MoeRouting {
    MoeRouting::new(ctx, host.config, host.router(ctx).unwrap()).unwrap()
}

/// Logits, and the gates of assigned pairs, as bits; the plan's gates too.
fn outcome(gpu: &Gpu, bound: &BoundLayer) -> (Vec<u32>, Vec<(usize, usize, u32)>) {
    let logits: Vec<f32> = gpu.download(bound.logits().unwrap()).unwrap();
    let assigned: Vec<u32> = gpu.download(bound.assigned().unwrap()).unwrap();
    let gates: Vec<f32> = gpu.download(bound.gates().unwrap()).unwrap();
    let tokens = logits.len() / EXPERTS as usize;
    let mut pairs = vec![];
    for t in 0..tokens {
        for e in bits::experts_of(&assigned, tokens, t) {
            pairs.push((t, e, gates[t * EXPERTS as usize + e].to_bits()));
        }
    }
    let (shape, plan) = bound.plan().unwrap();
    let plan = HostPlan::from_words(&shape, &gpu.download(plan).unwrap()).unwrap();
    let mut planned = vec![];
    for e in 0..EXPERTS as usize {
        for s in plan.expert_offsets[e]..plan.expert_offsets[e + 1] {
            let s = s as usize;
            planned.push((plan.token_of[s] as usize, e, plan.gate_of[s].to_bits()));
        }
    }
    planned.sort_unstable();
    assert_eq!(planned, pairs, "the plan has the gates of the pairs");
    (exact(&logits), pairs)
}

#[test]
fn a_part_has_the_bits_of_the_whole() {
    let Some(gpu) = gpu() else { return };
    let host = host(TokenChoice::new(3).with_score(Score::Sigmoid).with_scale(2.5));
    for ctx in contexts(&gpu) {
        let routing = routing(&ctx, &host);
        for parts in PARTS {
            let tokens: u32 = parts.iter().sum();
            let x = random(5, (tokens * HIDDEN) as usize);
            let hidden = gpu.upload(&x);
            let whole = routing.bind(&Batch::new(&hidden, tokens)).unwrap();
            gpu.run_layer(&whole).unwrap();
            let (logits, pairs) = outcome(&gpu, &whole);
            let (mut all_logits, mut all_pairs, mut first) = (vec![], vec![], 0);
            for &n in parts {
                let own = gpu.upload(&x[first * HIDDEN as usize..][..(n * HIDDEN) as usize]);
                let part = routing.bind(&Batch::new(&own, n).as_part_of(tokens)).unwrap();
                gpu.run_layer(&part).unwrap();
                let (logits, pairs) = outcome(&gpu, &part);
                all_logits.extend(logits);
                all_pairs.extend(pairs.iter().map(|&(t, e, g)| (first + t, e, g)));
                first += n as usize;
            }
            let what = format!("{parts:?}, {:?}", ctx.variant());
            assert_same(&all_logits, &logits, &what);
            assert_eq!(all_pairs, pairs, "{what}");
        }
    }
}

/// The experts' choice over the whole batch, from the values of its parts: by the twins.
fn chosen(rule: Routing, values: &[f32], own: &[Vec<u32>], parts: &[u32]) -> Vec<Vec<u32>> {
    let (tokens, experts) = (parts.iter().sum::<u32>(), EXPERTS as usize);
    let lists = |words: &[u32], n: u32| -> Vec<Vec<u32>> {
        let of = |e| bits::tokens_of(words, n as usize, e).into_iter().map(|t| t as u32).collect();
        (0..experts).map(of).collect()
    };
    let words = match rule {
        Routing::ExpertChoice(rule) => {
            let capacity = schedule::capacity(tokens, rule.experts_per_token, EXPERTS);
            expert_choice::cpu(values, experts, &[0, tokens], None, &[capacity])
        }
        Routing::TokenChoice(rule) => {
            let mut all = vec![vec![]; experts];
            let mut first = 0;
            for (words, &n) in own.iter().zip(parts) {
                for (all, list) in all.iter_mut().zip(lists(words, n)) {
                    all.extend(list.iter().map(|t| first + t));
                }
                first += n;
            }
            let all = bits::from_lists(tokens as usize, &all);
            let capacity = rule.capacity(tokens, EXPERTS).unwrap();
            expert_choice::cpu_drop(values, experts, &all, capacity).0
        }
        other => panic!("{other:?}"),
    };
    let mut first = 0;
    let mut of_parts = vec![];
    for &n in parts {
        let of = |list: Vec<u32>| -> Vec<u32> {
            list.iter().filter(|t| (first..first + n).contains(*t)).map(|t| t - first).collect()
        };
        let own: Vec<Vec<u32>> = lists(&words, tokens).into_iter().map(of).collect();
        of_parts.push(bits::from_lists(n as usize, &own));
        first += n;
    }
    of_parts
}

#[test]
fn experts_choose_over_the_whole_between_the_halves() {
    let Some(gpu) = gpu() else { return };
    let rules: [Routing; 3] = [
        ExpertChoice::new(2).into(),
        ExpertChoice::new(3).with_score(Score::Sigmoid).into(),
        TokenChoice::new(3).with_capacity_factor(0.75).into(),
    ];
    for ctx in contexts(&gpu) {
        for rule in rules {
            let host = host(rule);
            let routing = routing(&ctx, &host);
            for parts in PARTS {
                let tokens: u32 = parts.iter().sum();
                let x = random(5, (tokens * HIDDEN) as usize);
                let hidden = gpu.upload(&x);
                let whole = routing.bind(&Batch::new(&hidden, tokens)).unwrap();
                gpu.run_layer(&whole).unwrap();
                let want = outcome(&gpu, &whole);
                let (mut bound, mut values, mut own, mut first) = (vec![], vec![], vec![], 0);
                for &n in parts {
                    let rows = &x[first * HIDDEN as usize..][..(n * HIDDEN) as usize];
                    let batch = gpu.upload(rows);
                    let part = routing.bind_part(&Batch::new(&batch, n).as_part_of(tokens));
                    let part = part.unwrap();
                    let mut encoder = gpu.device.create_command_encoder(&Default::default());
                    part.encode_values(&mut encoder);
                    gpu.queue.submit([encoder.finish()]);
                    values.extend(gpu.download::<f32>(part.values().unwrap()).unwrap());
                    own.push(gpu.download::<u32>(part.assigned().unwrap()).unwrap());
                    bound.push(part);
                    first += n as usize;
                }
                let chosen = chosen(rule, &values, &own, parts);
                let (mut logits, mut pairs, mut first) = (vec![], vec![], 0);
                for ((part, words), &n) in bound.iter().zip(chosen).zip(parts) {
                    let Slice { buffer, offset, .. } = part.assigned().unwrap();
                    gpu.queue.write_buffer(buffer, offset, bytemuck::cast_slice(&words));
                    gpu.run_layer(part.after()).unwrap();
                    let (own, of) = outcome(&gpu, part.after());
                    logits.extend(own);
                    pairs.extend(of.iter().map(|&(t, e, g)| (first + t, e, g)));
                    first += n as usize;
                }
                assert_eq!((logits, pairs), want, "{rule:?}, {parts:?}, {:?}", ctx.variant());
            }
        }
    }
}

#[test]
fn parts_of_other_rules_are_errors() {
    let Some(gpu) = gpu() else { return };
    let ctx = Context::new(&gpu.device).unwrap();
    let x = gpu.upload(&vec![0f32; (4 * HIDDEN) as usize]);
    let name = |e| match e {
        Err(Error::Invalid { name, .. }) => name,
        other => panic!("{other:?}"),
    };
    let batch = Batch::new(&x, 4).as_part_of(8);
    let apart = routing(&ctx, &host(TokenChoice::new(2)));
    assert_eq!(name(apart.bind_part(&batch).map(|_| ())), "routing");
    let choice = routing(&ctx, &host(ExpertChoice::new(2)));
    let offsets = gpu.upload(&[0u32, 4]);
    let named = batch.with_sequences(Sequences::new(1, &offsets));
    assert_eq!(name(choice.bind_part(&named).map(|_| ())), "sequences");
    let none = gpu.upload::<f32>(&[0.0]);
    let empty = Batch::new(Slice::new(&none, 0, 0), 0).as_part_of(8);
    let part = choice.bind_part(&empty).unwrap();
    assert!(part.values().is_none() && part.assigned().is_none());
}

/// Words that a plan was taken apart from are what it is put together to.
#[test]
fn plans_of_the_host() {
    for (tokens, experts, shared) in [(40, 3, 1), (1, 1, 0), (70, 5, 2)] {
        let lists: Vec<Vec<u32>> = (0..experts)
            .map(|e| (0..tokens).filter(|t| (t * 7 + e * 3) % 5 < e + 1).collect())
            .collect();
        let routed = lists.iter().map(Vec::len).sum::<usize>() as u32;
        for slots in [routed.max(1), routed + 9] {
            let shape = PlanShape::on_host(tokens, experts, slots).with_shared_experts(shared);
            let assigned = bits::from_lists(tokens as usize, &lists);
            let gates = random(1, (tokens * experts) as usize);
            let plan = HostPlan::cpu(&shape, &assigned, &gates);
            let words = plan.to_words(&shape).unwrap();
            assert_eq!(HostPlan::from_words(&shape, &words).unwrap(), plan);
            let mut all = lists.clone();
            all.extend((0..shared).map(|_| (0..tokens).collect()));
            let rows = HostPlan::of_rows(&shape, &all).unwrap();
            let without = HostPlan {
                token_offsets: vec![0],
                gate_of: vec![],
                slot_of: vec![],
                ..plan.clone()
            };
            assert_eq!(rows, without);
        }
    }
    let shape = PlanShape::on_host(4, 2, 3);
    let bad = |lists: &[Vec<u32>]| HostPlan::of_rows(&shape, lists).unwrap_err().to_string();
    assert!(bad(&[vec![0]]).contains("of 1 experts"));
    assert!(bad(&[vec![4], vec![]]).contains("row 4 of 4"));
    assert!(bad(&[vec![0, 1], vec![2, 3]]).contains("more than the plan's 3 slots"));
    let plan = HostPlan::of_rows(&shape, &[vec![0, 1], vec![3]]).unwrap();
    assert!(plan.to_words(&PlanShape::on_host(4, 3, 3)).is_err());
    assert!(plan.to_words(&PlanShape::on_host(4, 2, 2)).is_err());
}

/// The matmul by a plan of the host, whose rows are in no order: those of each slot's token.
#[test]
fn a_matmul_by_a_plan_of_the_host() {
    let Some(gpu) = gpu() else { return };
    let config = LayerConfig::new(32, 40, 3, TokenChoice::new(1));
    let host = HostLayer::new(config);
    for ctx in contexts(&gpu) {
        let weights = host.weights_as(&ctx, &gpu.queue, WeightType::F32, None).unwrap();
        let shape = PlanShape::new(&ctx, 90, 3, 100);
        let rows: [Vec<u32>; 3] = [(0..70).rev().collect(), vec![], vec![89, 0, 1, 88, 5, 70]];
        let plan = HostPlan::of_rows(&shape, &rows).unwrap();
        let words = gpu.upload(&plan.to_words(&shape).unwrap());
        let h = random(9, 90 * 32);
        let x = gpu.upload(&h);
        let out = gpu.upload(&vec![f32::NAN; 100 * 40]);
        let stage = grouped_matmul::Stage::GateUp(config.activation);
        let op = grouped_matmul::GroupedMatmul::new(&ctx, &weights.shape(), stage).unwrap();
        let args = grouped_matmul::Args {
            x: grouped_matmul::Rows::Tokens((&x).into()),
            plan: (&words).into(),
            weights: &weights,
            places: None,
            out: (&out).into(),
            slots: 0..100,
            columns: 0..40,
        };
        gpu.run(&op.bind(&shape, args).unwrap()).unwrap();
        let got: Vec<f32> = gpu.download(&out).unwrap();
        let slots = (0..3).flat_map(|e| rows[e].iter().map(move |&row| (e, row as usize)));
        for (slot, (e, row)) in slots.enumerate() {
            let x = &h[row * 32..][..32];
            let [gate, up, _] = &host.experts[e];
            let [gate, up] = [gate, up].map(|w| grouped_matmul::cpu_row(x, &|i| w[i], 40));
            let want: Vec<f32> = (0..40)
                .map(|i| grouped_matmul::activate(config.activation, gate[i], up[i]) as f32)
                .collect();
            let what = format!("slot {slot}, {:?}", ctx.variant());
            testkit::compare::assert_close(&got[slot * 40..][..40], &want, 1e-5, 1e-4, &what);
        }
        assert!(got[76 * 40..].iter().all(|v| v.is_nan()), "slots without an item are left alone");
    }
}
