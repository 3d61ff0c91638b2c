//! Ranks that fail, each in a way of its own; what the others get is printed.
use crate::cases::Case;
use crate::run::weights;
use std::time::{Duration, Instant};
use testkit::layer::HostLayer;
use wgmoe_mpi::mpi::topology::SimpleCommunicator;
use wgmoe_mpi::wgmoe::layer::LayerConfig;
use wgmoe_mpi::wgmoe::routing::TokenChoice;
use wgmoe_mpi::wgmoe::{Context, Gpu, Slice, WeightType};
use wgmoe_mpi::{Batch, ExpertParallel, Options, RankWeights, Result, Split, World};

fn signal(name: &str) {
    let id = std::process::id().to_string();
    let _ = std::process::Command::new("kill").args([name, &id]).status();
    std::thread::sleep(Duration::from_secs(60));
}

/// What a rank gets of another's failure, and how long after its own first step that was.
pub fn run(comm: &SimpleCommunicator, fault: &str, rank: usize) -> Result<()> {
    // Ranks compile kernels when they get to it: only then do they go in step.
    let slow = World::with_limit(comm, Duration::from_secs(200))?;
    let bad = slow.rank() == rank;
    let mut start = Instant::now();
    let result = steps(comm, &slow, fault, bad, &mut start);
    if let Err(e) = &result {
        let (rank, seconds) = (slow.rank(), start.elapsed().as_secs_f64());
        println!("rank {rank}: after {seconds:.1} s: {e}");
    }
    result
}

fn steps(
    comm: &SimpleCommunicator,
    world: &World,
    fault: &str,
    bad: bool,
    start: &mut Instant,
) -> Result<()> {
    let gpu = Gpu::new()?;
    let ctx = Context::new(&gpu.device)?;
    let ranks = world.ranks();
    let few = fault == "few experts";
    let experts = if few { ranks as u32 - 1 } else { 2 * ranks as u32 };
    let mut config = LayerConfig::new(64, 32, experts, TokenChoice::new(2));
    if fault == "shape" && bad {
        config.intermediate = 64;
    }
    let tokens = if fault == "no tokens" && bad { 0 } else { 40 };
    let case = Case {
        name: fault.into(),
        layer: HostLayer::new(config),
        weight_type: if fault == "type" && bad { WeightType::Bf16 } else { WeightType::F32 },
        tokens: vec![tokens; ranks],
        experts: vec![2; ranks],
        add: false,
        sequences: None,
        ragged: false,
        blocks: None,
        chunk_rows: 64,
    };
    let split = Split::even(experts, ranks);
    let of = split.experts_of(world.rank());
    let own = RankWeights { experts: weights(&gpu, &ctx, &case, of.clone())?, shared: None };
    let device = (&ctx, &gpu.queue);
    let engine = if fault == "version" && bad { "engine 2" } else { "engine 1" };
    let options = (&split, Options::default().with_engine(engine));
    let router = case.layer.router(&ctx)?;
    let (mut own_again, router_again) = (own.clone(), router.clone());
    if fault == "weights" && bad {
        own_again.experts = weights(&gpu, &ctx, &case, of.start..of.end - 1)?; // one too few
    }
    let at_once = ["shape", "version", "type", "no tokens", "few experts"].contains(&fault);
    if bad && at_once {
        println!("rank {}: fails now", world.rank());
    }
    let layer = ExpertParallel::new(world, device, config, options, router, own)?;
    let x = vec![0.5f32; (tokens * 64 + 1) as usize];
    let [hidden, out] = [gpu.upload(&x), gpu.upload(&x)];
    let slice = |b| Slice::new(b, 0, u64::from(tokens) * 64 * 4);
    let mut bound = layer.bind(&Batch::new(slice(&hidden), tokens, slice(&out)))?;
    bound.run()?;
    gpu.wait()?;
    // The same again, within a limit of 4 s.
    let world = &World::with_limit(comm, Duration::from_secs(4))?;
    *start = Instant::now();
    if bad {
        println!("rank {}: fails now", world.rank());
    }
    if fault == "late" && bad {
        std::thread::sleep(Duration::from_secs(60));
    }
    let layer = ExpertParallel::new(world, device, config, options, router_again, own_again)?;
    let mut bound = layer.bind(&Batch::new(slice(&hidden), tokens, slice(&out)))?;
    bound.run()?;
    if bad {
        match fault {
            "killed" => signal("-KILL"),
            "stopped" => signal("-STOP"),
            "panics" => panic!("on purpose"),
            "fails" => {
                world.fail("out of cheese");
                return Err(wgmoe_mpi::Error::Mpi("out of cheese".into()));
            }
            _ => {}
        }
    }
    for _ in 0..3 {
        let result = bound.run();
        if let (Err(first), "fails") = (&result, fault) {
            // A world that has failed stays so: what was on its way is not taken for something else.
            let again = bound.run().map(|step| step.slots);
            assert_eq!(again.as_ref().err(), Some(first), "runs again");
        }
        result?;
    }
    gpu.wait()?;
    println!("rank {}: done", world.rank());
    Ok(())
}
