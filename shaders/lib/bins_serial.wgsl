// Histogram bins that one lane counts into: no atomics. Twin of bins_atomic.wgsl.
var<workgroup> bins: array<u32, 256u * EXPERTS>;

fn bin_clear(i: u32) {
    bins[i] = 0u;
}

fn bin_add(i: u32) {
    bins[i] += 1u;
}

fn bin_read(i: u32) -> u32 {
    return bins[i];
}
