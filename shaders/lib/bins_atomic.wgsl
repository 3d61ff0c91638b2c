// Histogram bins that many lanes count into. Twin of bins_serial.wgsl.
var<workgroup> bins: array<atomic<u32>, 256u * EXPERTS>;

fn bin_clear(i: u32) {
    atomicStore(&bins[i], 0u);
}

fn bin_add(i: u32) {
    atomicAdd(&bins[i], 1u);
}

fn bin_read(i: u32) -> u32 {
    return atomicLoad(&bins[i]);
}
