// Compiles WGSL files with Tint, the compiler of Chrome, on Dawn's null backend (no GPU and no driver needed). naga accepts
// what browsers refuse, such as barriers in non-uniform control flow; this shows it. Every accepted file becomes pipelines
// too, in this one process.
//
//   npm ci && node check.mjs FILE.wgsl|FOLDER...
//
// Exit status: 0 all accepted, 1 any refused, 2 nothing to check or a check that cannot fail.
import { create, globals } from 'webgpu';
import { readdirSync, readFileSync, statSync } from 'node:fs';
import { join } from 'node:path';

Object.assign(globalThis, globals);
// Kept: once it is collected, the process hangs or dies.
const gpu = create(['backend=null']);
const adapter = await gpu.requestAdapter();
const requiredFeatures = ['shader-f16', 'subgroups'].filter((f) => adapter.features.has(f));
const device = await adapter.requestDevice({ requiredFeatures });

// What this browser has against `source`, as lines of text.
async function errorsOf(source) {
  let code = source;
  // naga 30 rejects `enable subgroups;`, browsers require it. On the first line, so that line numbers stay.
  if (/\bsubgroup[A-Z]|subgroup_(size|invocation_id)/.test(code) && !/enable\s+subgroups/.test(code)) code = 'enable subgroups;' + code;
  device.pushErrorScope('validation');
  const module = device.createShaderModule({ code });
  const info = await module.getCompilationInfo();
  const refused = await device.popErrorScope();
  const errors = info.messages.filter((m) => m.type === 'error').map((m) => `line ${m.lineNum}: ${m.message}`);
  if (errors.length || refused) return errors.length ? errors : [refused.message];
  const entries = [...code.matchAll(/@compute[^{]*?\bfn\s+(\w+)/g)].map((match) => match[1]);
  for (const entryPoint of entries) {
    device.pushErrorScope('validation');
    device.createComputePipeline({ layout: 'auto', compute: { module, entryPoint } });
    const refused = await device.popErrorScope();
    if (refused) errors.push(`${entryPoint}: ${refused.message}`);
  }
  return errors;
}

// First, that this check can fail: the same kernel with a barrier that every lane reaches, and one that only some do.
const kernel = (guard) => `
  var<workgroup> shared_sum: u32;
  @group(0) @binding(0) var<storage, read_write> out: array<u32>;
  @compute @workgroup_size(64) fn main(@builtin(local_invocation_index) lane: u32) {
    if lane == 0u { shared_sum = 7u; }
    if ${guard} { workgroupBarrier(); }
    out[lane] = shared_sum;
  }`;
const good = await errorsOf(kernel('true'));
const bad = await errorsOf(kernel('lane < 32u'));
if (good.length || !bad.some((e) => /uniform/.test(e))) {
  console.error('this check must accept a plain kernel and refuse a barrier in non-uniform control flow, and said', { good, bad });
  process.exit(2);
}

const paths = process.argv.slice(2).flatMap((path) =>
  statSync(path).isDirectory() ? readdirSync(path).filter((name) => name.endsWith('.wgsl')).sort().map((name) => join(path, name)) : [path]);
if (!paths.length) {
  console.error('no WGSL file to check');
  process.exit(2);
}

// 64-bit integers and matrices are wgpu's own, not WebGPU's: kernels that use them are for native drivers alone.
const native = paths.filter((path) => /\bu64\b|\bcoop_mat/.test(readFileSync(path, 'utf8')));
const checked = paths.filter((path) => !native.includes(path));

let refused = 0;
for (const path of checked) {
  const errors = await errorsOf(readFileSync(path, 'utf8'));
  refused += Number(errors.length > 0);
  if (errors.length) console.log([`refused  ${path}`, ...errors.map((error) => `    ${error}`)].join('\n'));
}
console.log(`${native.length} files with 64-bit integers or matrices left out`);
console.log(`${checked.length - refused} passed, ${refused} failed`);
process.exit(refused ? 1 : 0);
