//! The bit set as index lists.
use testkit::{cases, prelude::*};
use wgmoe::ops::expert_lists::{Args, Dims, ExpertLists, PaddedArgs, cpu, cpu_padded};
use wgmoe::plan::bits;
use wgmoe::{Context, Gpu, Slice};

/// Runs both forms, in poisoned buffers, and compares them with the twins.
fn check(gpu: &Gpu, ctx: &Context, assigned: &[u32], [tokens, experts, room]: [usize; 3]) {
    let what = format!("{} T {tokens} E {experts} room {room}", variant_name(ctx));
    let op = ExpertLists::new(ctx).unwrap();
    // No binding is empty; what stands for no tokens is not looked at.
    let words = gpu.upload(if tokens == 0 { &[u32::MAX] } else { assigned });
    let dims = Dims { tokens: tokens as u32, experts: experts as u32, room: room as u32 };
    let [offsets, list, lost] = [experts + 1, room, experts].map(|n| Output::u32s(gpu, n));
    let args = Args {
        assigned: (&words).into(),
        offsets: offsets.slice(),
        list: list.slice(),
        lost: lost.slice(),
    };
    run(gpu, &op.bind(&dims, args).unwrap());
    let want = cpu(assigned, tokens, experts, room);
    assert_same(&offsets.get::<u32>(gpu), &want.0, &format!("{what}: offsets"));
    assert_same(&list.get::<u32>(gpu), &want.1, &format!("{what}: list"));
    assert_same(&lost.get::<u32>(gpu), &want.2, &format!("{what}: lost"));

    let room = room.div_ceil(experts);
    let what = format!("{what}: padded to {room}");
    let dims = Dims { room: room as u32, ..dims };
    let [list, counts, lost] = [experts * room, experts, experts].map(|n| Output::u32s(gpu, n));
    let args = PaddedArgs {
        assigned: (&words).into(),
        list: list.slice(),
        counts: counts.slice(),
        lost: lost.slice(),
    };
    run(gpu, &op.bind_padded(&dims, args).unwrap());
    let want = cpu_padded(assigned, tokens, experts, room);
    assert_same(&list.get::<u32>(gpu), &want.0, &format!("{what}: list"));
    assert_same(&counts.get::<u32>(gpu), &want.1, &format!("{what}: counts"));
    assert_same(&lost.get::<u32>(gpu), &want.2, &format!("{what}: lost"));
}

#[test]
fn the_twins_by_hand() {
    let words = bits::from_lists(40, &[vec![3, 39], vec![], vec![0, 31, 32]]);
    let none = u32::MAX;
    assert_eq!(
        cpu(&words, 40, 3, 6),
        (vec![0, 2, 2, 5], vec![3, 39, 0, 31, 32, none], vec![0, 0, 0])
    );
    assert_eq!(cpu(&words, 40, 3, 3), (vec![0, 2, 2, 3], vec![3, 39, 0], vec![0, 0, 2]));
    assert_eq!(
        cpu_padded(&words, 40, 3, 2),
        (vec![3, 39, none, none, 0, 31], vec![2, 0, 2], vec![0, 0, 1])
    );
}

#[test]
fn equals_twin() {
    let Some(gpu) = gpu() else { return };
    for (tokens, experts) in
        [(0, 1), (0, 1024), (1, 1), (31, 5), (32, 3), (33, 40), (257, 96), (100, 1024)]
    {
        for (i, probability) in [0.0, 0.1, 0.6, 1.0].into_iter().enumerate() {
            let mut assigned = cases::assignment(i as u64, tokens, experts, probability);
            let all: usize = assigned.iter().map(|w| w.count_ones() as usize).sum();
            if tokens % 32 != 0 {
                // Bits past the last token count for nothing.
                let columns = bits::columns(tokens);
                for row in assigned.chunks_exact_mut(columns) {
                    row[columns - 1] |= u32::MAX << (tokens % 32);
                }
            }
            for room in [1, all / 2, all, all + 77] {
                for ctx in contexts(&gpu).into_iter().filter(|c| !c.variant().subgroups) {
                    check(&gpu, &ctx, &assigned, [tokens, experts, room.max(1)]);
                }
            }
        }
    }
}

#[test]
fn long_batches() {
    let Some(gpu) = gpu() else { return };
    for (tokens, experts, probability, room) in [
        (70_000, 1024, 0.002, 150_000),
        (70_000, 8, 1.0, 560_000),
        (70_000, 1, 0.5, 60_000),
        (600_000, 2, 1.0, 1_200_000),
        (2_200_000, 1, 0.9, 3_900_000),
    ] {
        let assigned = cases::assignment(5, tokens, experts, probability);
        for ctx in contexts(&gpu).into_iter().filter(|c| !c.variant().subgroups) {
            check(&gpu, &ctx, &assigned, [tokens, experts, room]);
        }
    }
}

#[test]
fn what_does_not_fit_is_an_error() {
    let Some(gpu) = gpu() else { return };
    let ctx = &contexts(&gpu)[0];
    let op = ExpertLists::new(ctx).unwrap();
    let buffers = [6u64, 4, 10, 3].map(|n| gpu.upload(&vec![0u32; n as usize]));
    let [assigned, offsets, list, lost] = [0, 1, 2, 3].map(|i| Slice::from(&buffers[i]));
    let args = Args { assigned, offsets, list, lost };
    let bind = |tokens, experts, room, args| {
        let result = op.bind(&Dims { tokens, experts, room }, args);
        result.map(|_| ()).map_err(|e| e.to_string())
    };
    assert_eq!(bind(40, 3, 10, args), Ok(()));
    let wrong = |result: Result<(), String>| result.unwrap_err();
    assert!(wrong(bind(40, 0, 10, args)).contains("`experts`"));
    assert!(wrong(bind(40, 1025, 10, args)).contains("`experts`"));
    assert!(wrong(bind(70, 3, 10, args)).contains("`assigned`"));
    assert!(wrong(bind(40, 3, 11, args)).contains("`list`"));
    assert!(wrong(bind(40, 3, 10, Args { offsets: lost, ..args })).contains("`offsets`"));
    assert!(wrong(bind(40, 3, 10, Args { lost: offsets, ..args })).contains("`lost`"));
    assert!(wrong(bind(u32::MAX, 3, 10, args)).contains("`tokens`"));
    let empty = Slice { size: 0, ..list };
    assert!(wrong(bind(40, 3, 0, Args { list: empty, ..args })).contains("`room`"));
}
