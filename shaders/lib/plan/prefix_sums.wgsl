// Exclusive prefix sums over a workgroup, workgroup memory only.
// Contract: all WG lanes call, in uniform control flow.
struct Lane {
  @builtin(local_invocation_index) index: u32,
}

var<workgroup> scan_scratch: array<vec4<u32>, WG>;

struct Scan {
  before: vec4<u32>, // over lower lanes
  total: vec4<u32>,  // over all
}

fn team_scan(lane: Lane, value: vec4<u32>) -> Scan {
  scan_scratch[lane.index] = value;
  workgroupBarrier();
  var sum = value;
  for (var step = 1u; step < WG; step *= 2u) {
    var lower = vec4<u32>();
    if lane.index >= step {
      lower = scan_scratch[lane.index - step];
    }
    workgroupBarrier();
    sum += lower;
    scan_scratch[lane.index] = sum;
    workgroupBarrier();
  }
  let total = scan_scratch[WG - 1u];
  workgroupBarrier(); // the array may be used again
  return Scan(sum - value, total);
}
