//! The halves of a layer, each beside an engine's own other half.
use rand::{Rng, SeedableRng, rngs::StdRng};
use testkit::layer::HostLayer;
use testkit::{cases, prelude::*};
use wgmoe::layer::{Assignments, Batch, BoundLayer, LayerConfig, MoeExperts, MoeRouting, Scratch};
use wgmoe::ops::combine::{self, Combine};
use wgmoe::ops::{assign, assign_lists};
use wgmoe::plan::HostPlan;
use wgmoe::plan::Stats;
use wgmoe::plan::bits;
use wgmoe::routing::{BlockRule, Routing};
use wgmoe::{Gpu, models, wgpu};

fn config() -> LayerConfig {
    let config = models::find("llada2-mini").unwrap().config;
    let Routing::TokenChoice(rule) = config.routing else { unreachable!() };
    let rule = rule.without_groups().with_experts_per_token(3);
    let routing = Routing::TokenChoice(rule);
    {
        let mut config = config.with_routing(routing);
        config.hidden = 40;
        config.intermediate = 24;
        config.experts = 12;
        config
    }
}

fn submit(gpu: &Gpu, step: &BoundLayer) {
    let mut encoder = gpu.device.create_command_encoder(&Default::default());
    step.encode(&mut encoder);
    gpu.queue.submit([encoder.finish()]);
}

/// Compares an output with the experts on the CPU, given the twin's bit set and gates.
fn compare(sample: &HostLayer, x: &[f32], got: &[f32], bits: &[u32], gates: &[f32], what: &str) {
    let (d, e) = (sample.config.hidden as usize, sample.config.experts as usize);
    for (t, (x, got)) in x.chunks(d).zip(got.chunks(d)).enumerate() {
        let experts = bits::experts_of(bits, gates.len() / e, t);
        let chosen: Vec<(u32, f32)> =
            experts.into_iter().map(|i| (i as u32, gates[t * e + i])).collect();
        let want = sample.token(x, &chosen);
        let scale = want.iter().fold(0f32, |m, v| m.max(v.abs()));
        assert_close(got, &want, 2e-5 * scale + 1e-6, 2e-5, &format!("{what}: token {t}"));
    }
}

#[test]
fn experts_of_another_router() {
    let Some(gpu) = gpu() else { return };
    let sample = HostLayer::new(config());
    let (d, e, top) = (sample.config.hidden as usize, 12usize, 4usize);
    let mut rng = StdRng::seed_from_u64(7);
    for ctx in own_contexts(&gpu) {
        let weights = sample.weights(&ctx, &gpu.queue).unwrap();
        let LayerConfig { activation, shared_experts, .. } = sample.config;
        let experts = MoeExperts::new(&ctx, activation, shared_experts, weights).unwrap();
        let scratch = Scratch::new(&ctx);
        for tokens in [1, 33, 70] {
            let what = format!("{} T {tokens}", variant_name(&ctx));
            let x = random(3, tokens * d);
            let hidden = gpu.upload(&x);
            let run = |assignments, out: &Output| {
                let batch = Batch::new(&hidden, tokens as u32)
                    .into_out(out.slice())
                    .with_assignments(assignments)
                    .with_scratch(&scratch);
                let made = ctx.pipelines();
                let step = experts.bind(&batch).unwrap();
                assert_eq!(ctx.pipelines(), made, "{what}: pipelines made while binding");
                submit(&gpu, &step);
                Stats::from_words(&gpu.download::<u32>(step.stats()).unwrap()).unwrap()
            };

            // Ids in range, out of range, repeated, and empty places.
            let ids: Vec<u32> = (0..tokens * top)
                .map(|_| match rng.random_range(0..10) {
                    0 => u32::MAX,
                    1 => e as u32,
                    _ => rng.random_range(0..e as u32),
                })
                .collect();
            let gates = cases::values("random", 2, ids.len());
            let (want, want_gates, ignored) = assign::cpu(&ids, &gates, top, e);
            let (i, g) = (gpu.upload(&ids), gpu.upload(&gates));
            let of_tokens = Assignments::OfTokens {
                experts_per_token: top as u32,
                ids: (&i).into(),
                gates: (&g).into(),
            };
            let out = Output::f32s(&gpu, tokens * d);
            let stats = run(of_tokens, &out);
            assert_eq!(stats.ignored, ignored.iter().sum::<u32>(), "{what}: ids ignored");
            assert_eq!(
                stats.slots,
                want.iter().map(|w| w.count_ones()).sum::<u32>(),
                "{what}: slots"
            );
            compare(&sample, &x, &out.get(&gpu), &want, &want_gates, &format!("{what}, ids"));

            // The same pairs as lists, in another order, with a repeated token at the end.
            let mut lists: Vec<Vec<(u32, f32)>> = vec![vec![]; e];
            for t in (0..tokens).rev() {
                for i in bits::experts_of(&want, tokens, t) {
                    lists[i].push((t as u32, want_gates[t * e + i]));
                }
            }
            lists[e - 1].push((tokens as u32, 1.0));
            let offsets: Vec<u32> =
                (0..=e).map(|i| lists[..i].iter().map(|l| l.len() as u32).sum()).collect();
            let entries: Vec<(u32, f32)> = lists.concat();
            let list: Vec<u32> = entries.iter().map(|p| p.0).collect();
            let gates: Vec<f32> = entries.iter().map(|p| p.1).collect();
            let twin = assign_lists::cpu(&offsets, &list, &gates, tokens);
            assert_same(&twin.0, &want, &format!("{what}: twins of ids and of lists"));
            let [o, l] = [&offsets, &list].map(|v| gpu.upload(v));
            let g = gpu.upload(&gates);
            let of_experts = Assignments::OfExperts {
                entries: list.len() as u32,
                offsets: (&o).into(),
                tokens: (&l).into(),
                gates: (&g).into(),
            };
            let again = Output::f32s(&gpu, tokens * d);
            let stats = run(of_experts, &again);
            assert_eq!(stats.ignored, 1, "{what}: entries ignored");
            assert_same(
                &exact(&again.get(&gpu)),
                &exact(&out.get(&gpu)),
                &format!("{what}: lists give the bits that ids give"),
            );
        }
    }
}

/// An engine's experts: expert e multiplies by e + 1. It reads the plan where its sections lie.
const OWN_EXPERTS: &str = "
struct At { expert_offsets: u32, token_of: u32, experts: u32, hidden: u32 }
@group(0) @binding(0) var<uniform> at: At;
@group(0) @binding(1) var<storage, read> plan: array<u32>;
@group(0) @binding(2) var<storage, read> x: array<f32>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(64)
fn own(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let slot = group.x;
    if slot >= plan[0] { return; }
    var e = 0u;
    while plan[at.expert_offsets + e + 1u] <= slot { e++; }
    let token = plan[at.token_of + slot];
    for (var i = lane; i < at.hidden; i += 64u) {
        y[slot * at.hidden + i] = x[token * at.hidden + i] * f32(e + 1u);
    }
}";

#[test]
fn experts_of_another_engine() {
    let Some(gpu) = gpu() else { return };
    let base = config();
    let Routing::TokenChoice(rule) = base.routing else { unreachable!() };
    let coreset = Some(BlockRule::Capacity(5));
    let block = Routing::TokenChoice(coreset.map_or(rule, |c| rule.with_coreset(c)));
    for ctx in own_contexts(&gpu) {
        for (routing, tokens) in [(base.routing, 70), (base.routing, 32), (block, 70)] {
            let what = format!("{} T {tokens} {routing:?}", variant_name(&ctx));
            let sample = HostLayer::new(base.with_routing(routing).with_shared_experts(0));
            let (d, e) = (sample.config.hidden as usize, sample.config.experts as usize);
            let router = sample.router(&ctx).unwrap();
            let first = MoeRouting::new(&ctx, sample.config, router).unwrap();
            let x = random(3, tokens * d);
            let hidden = gpu.upload(&x);
            let made = ctx.pipelines();
            let step = first.bind(&Batch::new(&hidden, tokens as u32)).unwrap();
            assert_eq!(ctx.pipelines(), made, "{what}: pipelines made while binding");
            let (shape, plan) = step.plan().unwrap();
            let (at, slots) = (shape.sections().unwrap(), shape.slots().unwrap());

            let y = Output::f32s(&gpu, slots as usize * d);
            let out = Output::f32s(&gpu, tokens * d);
            let args = combine::Args {
                y: y.slice(),
                plan,
                out: out.slice().into(),
                columns: 0..d as u32,
                hidden: d as u32,
                add: false,
            };
            let last = Combine::new(&ctx).unwrap().bind(&shape, args).unwrap();
            let source = wgpu::ShaderSource::Wgsl(OWN_EXPERTS.into());
            let module = gpu
                .device
                .create_shader_module(wgpu::ShaderModuleDescriptor { label: None, source });
            let own = gpu.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
                label: None,
                layout: None,
                module: &module,
                entry_point: None,
                compilation_options: Default::default(),
                cache: None,
            });
            let params = gpu.device.create_buffer(&wgpu::BufferDescriptor {
                label: None,
                size: 16,
                usage: wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST,
                mapped_at_creation: false,
            });
            let words = [at.expert_offsets, at.token_of, e as u32, d as u32];
            gpu.queue.write_buffer(&params, 0, bytemuck::cast_slice(&words));
            let resources = [
                params.as_entire_binding(),
                plan.binding(),
                hidden.as_entire_binding(),
                y.slice().binding(),
            ];
            let entries: Vec<_> = (0..)
                .zip(resources)
                .map(|(binding, resource)| wgpu::BindGroupEntry { binding, resource })
                .collect();
            let group = gpu.device.create_bind_group(&wgpu::BindGroupDescriptor {
                label: None,
                layout: &own.get_bind_group_layout(0),
                entries: &entries,
            });

            let mut encoder = gpu.device.create_command_encoder(&Default::default());
            let mut pass = encoder.begin_compute_pass(&Default::default());
            step.record(&mut pass);
            pass.set_pipeline(&own);
            pass.set_bind_group(0, &group, &[]);
            pass.dispatch_workgroups(slots, 1, 1);
            last.record(&mut pass);
            drop(pass);
            gpu.queue.submit([encoder.finish()]);

            let assigned: Vec<u32> = gpu.download(step.assigned().unwrap()).unwrap();
            let gates: Vec<f32> = gpu.download(step.gates().unwrap()).unwrap();
            let words: Vec<u32> = gpu.download(plan).unwrap();
            let read = HostPlan::from_words(&shape, &words).unwrap();
            assert_eq!(read, HostPlan::cpu(&shape, &assigned, &gates), "{what}: plan");
            let want: Vec<f32> = (0..tokens * d)
                .map(|i| {
                    let t = i / d;
                    let of_token = bits::experts_of(&assigned, tokens, t).into_iter();
                    of_token.map(|n| gates[t * e + n] * x[i] * (n + 1) as f32).sum()
                })
                .collect();
            assert!(want.iter().any(|v| *v != 0.0), "{what}: no work");
            assert_close(&out.get::<f32>(&gpu), &want, 1e-5, 1e-5, &what);
        }
    }
}

#[test]
fn assignments_that_do_not_fit() {
    let Some(gpu) = gpu() else { return };
    let ctx = own_contexts(&gpu)[0].clone();
    let sample = HostLayer::new(config());
    let weights = sample.weights(&ctx, &gpu.queue).unwrap();
    let LayerConfig { activation, .. } = sample.config;
    let all = weights.shape().experts;
    let none = MoeExperts::new(&ctx, activation, all, weights.clone()).unwrap_err();
    let text = "`shared_experts`: 13 of only 13 experts, and one must be routed";
    assert_eq!(none.to_string(), text);
    let experts = MoeExperts::new(&ctx, activation, 1, weights).unwrap();
    let (x, b) = (gpu.upload(&[0f32; 2 * 40]), gpu.upload(&[0u32; 64]));
    let out = gpu.upload(&[0f32; 2 * 40]);
    let words = |n: u64| wgmoe::Slice::new(&b, 0, 4 * n);
    let bind = |tokens, assignments| {
        let size = u64::from(tokens) * 160;
        let [hidden, out] = [&x, &out].map(|b| wgmoe::Slice::new(b, 0, size));
        let batch = Batch::new(hidden, tokens).into_out(out).with_assignments(assignments);
        experts.bind(&batch).map(|_| ()).map_err(|e| e.to_string())
    };
    let of_tokens = |top, ids| Assignments::OfTokens {
        experts_per_token: top,
        ids: words(ids),
        gates: words(ids),
    };
    let of_experts = |entries, offsets, list| Assignments::OfExperts {
        entries,
        offsets: words(offsets),
        tokens: words(list),
        gates: words(list),
    };
    assert_eq!(bind(2, of_tokens(3, 6)), Ok(()));
    assert_eq!(bind(0, of_tokens(3, 6)), Ok(()));
    assert_eq!(bind(2, of_tokens(0, 6)), Err("`experts_per_token`: must not be 0".into()));
    assert_eq!(
        bind(2, of_tokens(3, 5)),
        Err("`ids`: expected 24 bytes, [2, 3] u32, got 20".into())
    );
    assert_eq!(bind(2, of_experts(5, 13, 5)), Ok(()));
    assert_eq!(bind(2, of_experts(0, 13, 5)), Err("`entries`: must not be 0".into()));
    assert_eq!(
        bind(2, of_experts(5, 12, 5)),
        Err("`offsets`: expected 52 bytes, [13] u32, got 48".into())
    );
    assert_eq!(
        bind(2, of_experts(5, 13, 4)),
        Err("`tokens`: expected 20 bytes, [5] u32, got 16".into())
    );
}
