//! The same beside what is not a rule: another router's choice, layers under a memory budget, outputs in halves, slots that
//! are cut, errors.
use super::{Case, D, E, K, host, is_set, masked, routed, rules, run_layer, targets};
use std::sync::Arc;
use testkit::compare::largest;
use testkit::prelude::*;
use wgmoe::layer::cached::{CacheOptions, CachedLayer};
use wgmoe::layer::{Assignments, Batch, MoeExperts, MoeRouting, Router, Tensor};
use wgmoe::plan::HostPlan;
use wgmoe::routing::{ExpertChoice, GateRule, TokenChoice};
use wgmoe::{Activation, Floats, Slice, wgpu};

/// Tokens in another order have the same experts, under a choice that is each token's own.
#[test]
fn a_permutation_of_rows_permutes() {
    let Some(gpu) = gpu() else { return };
    let ctx = &targets(&gpu)[0];
    let (_, routing) = rules().remove(0);
    let layer = host(routing, 1).layer(ctx, &gpu.queue).unwrap();
    let case = Case::new(70, 6);
    let tokens = case.tokens();
    let places: Vec<usize> = (0..tokens).map(|t| (t * 27 + 5) % tokens).collect();
    let (mut x, mut active) = (vec![0.0; tokens * D], vec![0u32; tokens.div_ceil(32)]);
    for (t, &to) in places.iter().enumerate() {
        x[to * D..][..D].copy_from_slice(&case.x[t * D..][..D]);
        active[to / 32] |= u32::from(is_set(case.active.as_ref().unwrap(), t)) << (to % 32);
    }
    let other = Case { x, active: Some(active), ..case.clone() };
    let before = vec![0.25; tokens * D];
    let (want, _) = run_layer(&gpu, &layer, &case, &before, false);
    let (got, _) = run_layer(&gpu, &layer, &other, &before, false);
    for (t, &to) in places.iter().enumerate() {
        let [got, want] = [&got[to * D..][..D], &want[t * D..][..D]];
        // A row may be another item's, whose sums have another order.
        let atol = 1e-5 * largest(want) + 1e-6;
        assert_close(got, want, atol, 1e-5, &format!("token {t}"));
    }
}

/// What is cut is of the routed experts alone, and shared ones hold what is active.
#[test]
fn slots_are_cut_beside_inactive_rows() {
    let Some(gpu) = gpu() else { return };
    for ctx in targets(&gpu) {
        for tokens in [20, 70] {
            let case = Case::new(tokens, 7);
            let host = host(TokenChoice::new(K).into(), 2);
            let layer = host.layer(&ctx, &gpu.queue).unwrap();
            let out = Output::f32s(&gpu, tokens * D);
            let got = case.with_batch(&gpu, host.config.routing, |batch| {
                let batch = batch.into_out(out.slice()).with_routed_slots(17);
                let bound = layer.bind(&batch).unwrap();
                gpu.run_layer(&bound).unwrap();
                routed(&gpu, &bound)
            });
            let active = case.active.as_ref().unwrap();
            let shape = wgmoe::PlanShape::new(&ctx, tokens as u32, E as u32, 17);
            let shape = shape.with_shared_experts(2);
            let gates = masked(&got.gates, &got.assigned, tokens);
            let want = HostPlan::cpu_active(&shape, &got.assigned, &gates, active);
            assert_eq!(got.plan, want, "{} {tokens}", variant_name(&ctx));
            assert!(got.stats.cut > 0);
        }
    }
}

/// Outputs in bf16, and the residual form.
#[test]
fn halves_of_inactive_rows_stay() {
    let Some(gpu) = gpu() else { return };
    for ctx in targets(&gpu) {
        for (name, routing) in rules().into_iter().take(3) {
            let host = host(routing, 1);
            let layer = host.layer(&ctx, &gpu.queue).unwrap();
            let case = Case::new(70, 8);
            let (tokens, active) = (case.tokens(), case.active.clone().unwrap());
            let before: Vec<u16> = (0..tokens * D).map(|i| 0x3f80 + (i % 61) as u16).collect();
            for add in [false, true] {
                let out = Output::holding(&gpu, &before);
                case.with_batch(&gpu, routing, |batch| {
                    let floats = Floats::bf16(out.slice());
                    let batch = if add { batch.added_to(floats) } else { batch.into_out(floats) };
                    gpu.run_layer(&layer.bind(&batch).unwrap()).unwrap();
                });
                let got: Vec<u16> = out.get(&gpu);
                for t in 0..tokens {
                    let same = got[t * D..][..D] == before[t * D..][..D];
                    assert_eq!(same, !is_set(&active, t), "{name}, add {add}: token {t}");
                }
            }
        }
    }
}

/// Another router's choice, token by token and expert by expert: what names a token that is not active is
/// as if it were an empty place, whatever it says.
#[test]
fn another_routers_choice() {
    let Some(gpu) = gpu() else { return };
    let tokens = 70;
    let case = Case::new(tokens, 9);
    let active = case.active.clone().unwrap();
    let host = host(TokenChoice::new(K).into(), 1);
    let k = K as usize;
    let lots = random(10, tokens * k);
    let mut ids: Vec<u32> = lots.iter().map(|v| (v.to_bits() >> 5) % (E as u32 + 3)).collect();
    ids[4] = u32::MAX;
    let gates = random(11, tokens * k);
    let empty_where = |ids: &[u32], token_of: &dyn Fn(usize) -> usize| -> Vec<u32> {
        let there = |i: usize| token_of(i) >= tokens || is_set(&active, token_of(i));
        ids.iter().enumerate().map(|(i, &id)| if there(i) { id } else { u32::MAX }).collect()
    };
    // Lists of experts: entries of tokens, some of them no tokens.
    let list: Vec<u32> = lots.iter().map(|v| (v.to_bits() >> 4) % (tokens as u32 + 4)).collect();
    let offsets: Vec<u32> = (0..=E).map(|e| (e * list.len() / E) as u32).collect();
    let by_token = empty_where(&ids, &|i| i / k);
    let by_list = empty_where(&list, &|i| list[i] as usize);
    let (by_token, by_token_gates, lost) = wgmoe::reference::assign(&by_token, &gates, k, E);
    let (lists, list_gates, lost_of_lists) =
        wgmoe::reference::assign_lists(&offsets, &by_list, &gates, tokens);
    for ctx in targets(&gpu) {
        let weights = host.weights(&ctx, &gpu.queue).unwrap();
        let op = MoeExperts::new(&ctx, Activation::Silu, 1, weights).unwrap();
        let [hidden, gate_buffer] = [&case.x, &gates].map(|v| gpu.upload(v));
        let [ids, list, offsets, bits_of] = [&ids, &list, &offsets, &active].map(|v| gpu.upload(v));
        let of_tokens = Assignments::OfTokens {
            experts_per_token: K,
            ids: (&ids).into(),
            gates: (&gate_buffer).into(),
        };
        let of_experts = Assignments::OfExperts {
            entries: gates.len() as u32,
            offsets: (&offsets).into(),
            tokens: (&list).into(),
            gates: (&gate_buffer).into(),
        };
        for (assignments, assigned, gates, lost) in [
            (of_tokens, &by_token, &by_token_gates, &lost),
            (of_experts, &lists, &list_gates, &lost_of_lists),
        ] {
            let what = format!("{}, {assignments:?}", variant_name(&ctx));
            let before = random(12, tokens * D);
            let out = Output::holding(&gpu, &before);
            let batch = Batch::new(&hidden, tokens as u32).into_out(out.slice());
            let bound =
                op.bind(&batch.with_active(&bits_of).with_assignments(assignments)).expect("bind");
            gpu.run_layer(&bound).unwrap();
            let got = routed(&gpu, &bound);
            assert_same(&got.assigned, assigned, &what);
            assert_eq!(got.stats.ignored, lost.iter().sum::<u32>(), "{what}");
            let made = host.outputs(&case.x, assigned, gates);
            let out: Vec<f32> = out.get(&gpu);
            for t in 0..tokens {
                let row = t * D..(t + 1) * D;
                if is_set(&active, t) {
                    let want = &made[row.clone()];
                    let atol = 1e-4 * largest(want) + 1e-5;
                    assert_close(&out[row], want, atol, 1e-4, &format!("{what}: token {t}"));
                } else {
                    assert_eq!(exact(&out[row.clone()]), exact(&before[row]), "{what}: token {t}");
                }
            }
        }
    }
}

#[test]
fn cached_layers_leave_the_same_rows() {
    let Some(gpu) = gpu() else { return };
    for ctx in targets(&gpu) {
        for (name, routing) in rules().into_iter().take(4) {
            let host = Arc::new(host(routing, 1));
            let layer = host.layer(&ctx, &gpu.queue).unwrap();
            let case = Case::new(70, 13);
            let before = random(14, 70 * D);
            let (want, _) = run_layer(&gpu, &layer, &case, &before, true);
            let shape = host.config.expert_shape(wgmoe::WeightType::F32);
            let budget = 6 * shape.device_bytes() + 4 * u64::from(shape.experts) + 100;
            let options = CacheOptions {
                types: Some(wgmoe::WeightType::F32.into()),
                ..CacheOptions::new(budget)
            };
            let router = host.router(&ctx).unwrap();
            let source = host.clone();
            let mut cached =
                CachedLayer::new(&ctx, &gpu.queue, host.config, router, source, options).unwrap();
            let out = Output::holding(&gpu, &before);
            case.with_batch(&gpu, routing, |batch| {
                let mut step = cached.bind(&batch.added_to(out.slice())).unwrap();
                cached.run(&gpu.queue, &mut step).unwrap();
                gpu.wait().unwrap();
            });
            let what = format!("{name}, {}", variant_name(&ctx));
            assert_same(&exact(&out.get::<f32>(&gpu)), &exact(&want), &what);
        }
    }
}

/// Gates of tables are made by three kernels, of few tokens too.
#[test]
fn tables_scale_gates_of_few_tokens() {
    let Some(gpu) = gpu() else { return };
    for ctx in targets(&gpu) {
        let case = Case::new(20, 15);
        let host = host(TokenChoice::new(K).with_gate(GateRule::Softmax).into(), 1);
        let (by_count, by_expert) = (random(16, E + 1), random(17, E));
        let mut router: Router = host.router(&ctx).unwrap();
        router.scale_by_count = Some(Tensor::new(&ctx, "by count", &by_count).unwrap());
        router.scale_by_expert = Some(Tensor::new(&ctx, "by expert", &by_expert).unwrap());
        let op = MoeRouting::new(&ctx, host.config, router).unwrap();
        let got = case.with_batch(&gpu, host.config.routing, |batch| {
            let bound = op.bind(&batch).unwrap();
            gpu.run_layer(&bound).unwrap();
            routed(&gpu, &bound)
        });
        let scales = wgmoe::ops::plan_count::Scales {
            scale_by_count: Some(&by_count[..]),
            scale_by_expert: Some(&by_expert[..]),
        };
        let [logits, ..] = got.selection.as_ref().unwrap();
        let rule = GateRule::Softmax;
        let want = wgmoe::reference::gates(&got.assigned, logits, E, rule, 1.0, scales);
        assert_close(&masked(&got.gates, &got.assigned, 20), &want, 1e-6, 1e-5, "gates");
    }
}

#[test]
fn what_does_not_fit() {
    let Some(gpu) = gpu() else { return };
    let ctx = &targets(&gpu)[0];
    let hidden = gpu.upload(&random(1, 70 * D));
    let [short, fits] = [2, 3].map(|n| gpu.upload(&vec![u32::MAX; n]));
    let read_only = gpu.device.create_buffer(&wgpu::BufferDescriptor {
        label: Some("no storage"),
        size: 12,
        usage: wgpu::BufferUsages::COPY_DST,
        mapped_at_creation: false,
    });
    for (name, routing) in rules() {
        let host = host(routing, 1);
        let op = MoeRouting::new(ctx, host.config, host.router(ctx).unwrap()).unwrap();
        let batch = Batch::new(&hidden, 70);
        let error =
            |active: &wgpu::Buffer| op.bind(&batch.with_active(active)).unwrap_err().to_string();
        assert_eq!(error(&short), "`active`: expected 12 bytes, [3] u32, got 8", "{name}");
        let usage = error(&read_only);
        assert!(usage.starts_with("`active`"), "{name}: {usage}");
    }
    let host = host(TokenChoice::new(K).into(), 1);
    let layer = host.layer(ctx, &gpu.queue).unwrap();
    let out = gpu.upload(&vec![0f32; 70 * D]);
    let batch = Batch::new(&hidden, 70).into_out(&out);
    let inside = Slice::new(&out, 0, 12);
    let error = layer.bind(&batch.with_active(inside)).unwrap_err().to_string();
    assert!(error.contains("`out`") && error.contains("`active`"), "{error}");
    let part = ExpertChoice::new(K);
    let op = MoeRouting::new(ctx, host.config.with_routing(part), host.router(ctx).unwrap());
    let batch = Batch::new(&hidden, 70).as_part_of(140).with_active(&fits);
    let error = op.unwrap().bind_part(&batch).unwrap_err().to_string();
    assert!(error.starts_with("`active`"), "{error}");
}
