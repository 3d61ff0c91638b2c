//! The profiling mode.
use testkit::device::required;
use testkit::layer::HostLayer;
use testkit::prelude::{assert_same, gpu};
use wgmoe::layer::{Batch, LayerConfig};
use wgmoe::ops::gather::{Args, Dims, Gather};
use wgmoe::routing::TokenChoice;
use wgmoe::{BoundOp, Context, Gpu, WeightType, wgpu};

/// Whether the adapter says that it has timestamps, whatever the device was made with.
fn lists_timestamps(gpu: &Gpu) -> bool {
    let all = pollster::block_on(Gpu::adapters());
    let adapter = all.iter().find(|a| a.get_info() == gpu.info).expect("the adapter");
    adapter.features().contains(wgpu::Features::TIMESTAMP_QUERY)
}

/// More dispatches than a query set holds; they run in order, and each is named.
#[test]
fn times_every_dispatch() {
    let Some(gpu) = gpu() else { return };
    let ctx = Context::new(&gpu.device).unwrap();
    let op = Gather::new(&ctx).unwrap();
    let reversed: Vec<u32> = (0..4).rev().collect();
    let values: Vec<f32> = (0..16).map(|i| i as f32).collect();
    let (x, out) = (gpu.upload(&values), gpu.upload(&[f32::NAN; 16]));
    let token_of = gpu.upload(&reversed);
    let bind = |x, out| {
        let dims = Dims { tokens: 4, slots: 4, hidden: 4 };
        op.bind(&dims, Args { x, token_of: (&token_of).into(), out }).unwrap()
    };
    let [there, back] = [bind((&x).into(), (&out).into()), bind((&out).into(), (&x).into())];
    let dispatches = there.dispatches().iter().chain(back.dispatches()).cycle();

    let alone = gpu.profile_alone(dispatches.clone().take(3)).unwrap();
    let want: Vec<f32> = (0..16).map(|i| ((3 - i / 4) * 4 + i % 4) as f32).collect();
    assert_same(&gpu.download::<f32>(&out).unwrap(), &want, "after three");
    assert_same(&gpu.download::<f32>(&x).unwrap(), &values, "after three");
    assert!(alone.iter().all(|(name, ms)| name == "gather" && *ms > 0.0));
    assert_eq!(alone.len(), 3);

    // On a developer's machine a driver may be at fault; where a GPU is required, timestamps are
    // too.
    let must = required() && lists_timestamps(&gpu);
    for count in [0, 1, 2048, 2049, 5000] {
        match gpu.profile(dispatches.clone().take(count)).unwrap() {
            Some(times) => {
                assert_eq!(times.len(), count);
                assert!(times.iter().all(|(name, ms)| name == "gather" && *ms >= 0.0));
            }
            None if must => panic!("{count} dispatches: the adapter has timestamps, none came"),
            None => eprintln!("{count} dispatches: no timestamps that can be used"),
        }
    }
    assert_eq!(gpu.profile(BoundOp::default().dispatches()).unwrap().map_or(0, |t| t.len()), 0);
}

/// One kernel runs once a stage, kind of item and page; the names say which is which.
#[test]
fn names_tell_pages_apart() {
    let Some(gpu) = gpu() else { return };
    let ctx = Context::new(&gpu.device).unwrap();
    let host = HostLayer::new(LayerConfig::new(64, 64, 4, TokenChoice::new(2)));
    // Two experts a page.
    let limit = Some(2 * 64 * 64 * 4);
    let layer = host.layer_as(&ctx, &gpu.queue, WeightType::F32, limit).unwrap();
    assert_eq!(layer.weights().page_counts(), [2, 2]);
    let [hidden, out] = [(); 2].map(|()| gpu.upload(&[0.5f32; 64 * 4]));
    let bound = layer.bind(&Batch::new(&hidden, 4).into_out(&out)).unwrap();
    let timed = [
        Some(gpu.profile_alone(bound.dispatches()).unwrap()),
        gpu.profile(bound.dispatches()).unwrap(),
    ];
    for times in timed.into_iter().flatten() {
        let names: Vec<&str> = times.iter().map(|(name, _)| &**name).collect();
        let mut once = names.clone();
        once.sort_unstable();
        once.dedup();
        assert_eq!(once.len(), names.len(), "{names:?}");
        for end in ["gate_up, skinny items, page 2 of 2", "down, skinny items, page 1 of 2"] {
            assert!(names.iter().any(|name| name.ends_with(end)), "{end}: {names:?}");
        }
    }
}
