// Compiles WGSL files with Tint, the compiler of Chrome, on Dawn's null backend (no GPU and no driver needed). naga accepts
// what browsers refuse, such as barriers in non-uniform control flow; this shows it. (No pipelines are made: that crashes
// this binding now and then. The suite's shader tests hold the kernels to WebGPU's default limits.)
//
//   npm ci && node check.mjs FILE.wgsl|FOLDER...
//
// Exit status: 0 all accepted, 1 any refused, 2 nothing to check or a check that cannot fail.
import { create, globals } from 'webgpu';
import { spawnSync } from 'node:child_process';
import { readdirSync, readFileSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

Object.assign(globalThis, globals);
const adapter = await create(['backend=null']).requestAdapter();
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
  return !errors.length && refused ? [refused.message] : errors;
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
const [selfTest, child] = ['--self-test', '--verdict'].map((flag) => process.argv[2] === flag);
if (selfTest) {
  const good = await errorsOf(kernel('true'));
  const bad = await errorsOf(kernel('lane < 32u'));
  const works = !good.length && bad.some((e) => /uniform/.test(e));
  if (!works) console.error('it must accept a plain kernel and refuse a barrier in non-uniform control flow, and said', { good, bad });
  process.exit(works ? 0 : 1);
}
if (child) {
  const errors = await errorsOf(readFileSync(process.argv[3], 'utf8'));
  if (errors.length) console.log([`refused  ${process.argv[3]}`, ...errors.map((error) => `    ${error}`)].join('\n'));
  process.exit(errors.length ? 1 : 0);
}

const paths = process.argv.slice(2).flatMap((path) =>
  statSync(path).isDirectory() ? readdirSync(path).filter((name) => name.endsWith('.wgsl')).sort().map((name) => join(path, name)) : [path]);
if (!paths.length) {
  console.error('no WGSL file to check');
  process.exit(2);
}

// 64-bit integers are wgpu's own, not WebGPU's: kernels that use them are variants for native drivers alone.
const native = paths.filter((path) => /\bu64\b/.test(readFileSync(path, 'utf8')));
const checked = paths.filter((path) => !native.includes(path));

// The compiler's node binding crashes or hangs in one process of ten or so: each file has a process of its own, started
// again where it died without a verdict.
function verdict(...args) {
  for (let attempt = 0; attempt < 20; attempt++) {
    const run = spawnSync(process.execPath, [fileURLToPath(import.meta.url), ...args], { encoding: 'utf8', timeout: 20_000 });
    if (run.status === 0 || run.status === 1) return run;
  }
  console.error(`no verdict on ${args.join(' ')}`);
  process.exit(2);
}

const self = verdict('--self-test');
if (self.status !== 0) {
  console.error(`this check does not work: ${self.stderr}`);
  process.exit(2);
}
let refused = 0;
for (const path of checked) {
  const run = verdict('--verdict', path);
  refused += run.status;
  if (run.status) process.stdout.write(run.stdout);
}
console.log(`${native.length} files with 64-bit integers left out`);
console.log(`${checked.length - refused} passed, ${refused} failed`);
process.exit(refused ? 1 : 0);
