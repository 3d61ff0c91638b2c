// The page: the device, the checks, the measuring. The picture is see.js's.
import { call, on } from './kernels.js';
import * as see from './see.js';

const $ = (id) => document.getElementById(id);
const element = (name, text, className = '') => Object.assign(document.createElement(name), { textContent: text, className });

const bytes = (n) => (n >= 2 ** 30 ? `${+(n / 2 ** 30).toFixed(1)} GiB` : n >= 2 ** 20 ? `${Math.round(n / 2 ** 20)} MiB` : n >= 1024 ? `${Math.round(n / 1024)} KiB` : `${n} B`);

/// What to switch on, where there is no WebGPU.
function missing(why, detail) {
  if (why === 'insecure') return 'WebGPU needs a page that comes by https or from this computer (localhost), and this one does not.';
  const agent = navigator.userAgent;
  const how = /Firefox/.test(agent)
    ? 'take the newest Firefox, or open about:config and set dom.webgpu.enabled to true'
    : /Safari/.test(agent) && !/Chrom/.test(agent)
      ? 'it comes with version 26; before that, switch on WebGPU among the feature flags of Safari’s settings'
      : 'switch on graphics acceleration in the settings, or “Unsafe WebGPU Support” at chrome://flags';
  const what = {
    none: 'This browser gives this page no WebGPU', 'no device': 'This browser has WebGPU, but no device for it',
    refused: `This browser’s WebGPU refused a device (${detail})`, late: `This browser’s WebGPU did not give ${detail}`,
  };
  return `${what[why]}: ${how}, and load the page again.`;
}

const twinsStandIn = "Until then, the kernels' twins on your CPU stand in: plain loops that compute the same, without a GPU.";
const checkWords = $('check-words').textContent;

/// The twins do it all.
function withoutDevice(why) {
  hasDevice = false;
  $('device').textContent = `${why} ${twinsStandIn}`;
  $('limits-of').hidden = true;
  $('again-of').hidden = false;
  $('where').textContent = 'by the CPU twins';
  $('check-words').textContent = 'Without a device, the twins are checked themselves: recorded layers of a reference implementation are run again on the CPU, what each routing rule chooses is compared with a program that sorts, and its experts are run in two ways that must agree.';
  $('measure-state').textContent = 'There is no GPU to measure.';
  occupy();
  return see.use('none');
}

/// Looks for a device, and routes on it.
async function openDevice() {
  $('again-of').hidden = true;
  const { why, detail, about, checks } = await call('open');
  if (!about) {
    names = ofTwins;
    return withoutDevice(missing(why, detail));
  }
  const name = about.name || 'A device whose name the browser keeps to itself';
  $('device').textContent = `${name}, through WebGPU${about.software ? ': a software driver, so expect it to be slow' : ''}.`;
  $('where').textContent = 'on your device';
  $('check-words').textContent = checkWords;
  $('measure-state').textContent = '';
  const shown = {
    'largest binding': bytes, 'largest buffer': bytes, 'workgroup memory': bytes,
    bindings: (n) => `${n} storage buffers`, lanes: (n) => `${n} in a workgroup`,
  };
  const row = (term, value) => {
    const div = document.createElement('div');
    div.append(element('dt', term), element('dd', value));
    return div;
  };
  $('limits').replaceChildren(
    ...about.limits.map(([term, value]) => row(term[0].toUpperCase() + term.slice(1), shown[term](value))),
    row('Timestamps', about.timestamps ? 'yes' : 'no'),
    row('Kernels', about.variant === 'Wide' ? 'for many lanes' : 'for a software driver'),
  );
  $('limits-of').hidden = false;
  if (about.software) $('seconds').value = '300';
  hasDevice = true;
  names = checks;
  occupy();
  return see.use('cold');
}

/// The device is gone, for good: the one place where that is said.
function lost(why) {
  checking &&= 'lost';
  names = ofTwins;
  return withoutDevice(`Your device was lost${why === 'Unknown' ? '' : ` (${why.replace(/\.$/, '')})`}. That happens when a driver is reset, or a computer sleeps. What was done stays; “Look for a device again” starts anew.`);
}

let hasDevice = false;
let ofTwins = []; // names of the twins' checks
let names = []; // of those that are made
let checking = false; // true, 'stop' (by the visitor) or 'lost'
let measuring = false;

/// Only one of the parts has the device at a time; the picture may go on while checks run.
function occupy() {
  $('check-go').disabled = measuring || checking === 'stop' || checking === 'lost';
  $('measure-go').disabled = Boolean(checking) || (!hasDevice && !measuring);
  $('again').disabled = Boolean(checking) || measuring;
  see.pause(measuring);
  see.share(Boolean(checking));
}

/// `?check=` of the page's address: only the checks whose names hold one of its parts, which commas divide.
const only = new URLSearchParams(location.search).get('check')?.split(',');

/// The checks that there are to make: their names, and what makes each.
async function toCheck() {
  const list = await fetch('golden/list.json');
  if (!list.ok) throw new Error(`golden/list.json: ${list.status} ${list.statusText}`);
  const recorded = await list.json();
  return [
    ...recorded.map((name) => [`recorded: ${name.replace(/\.safetensors$/, '')}`, () => call('recorded', [name])]),
    ...names.map((name, i) => [name, () => call('check', [i])]),
  ].filter(([name]) => !only || only.some((part) => name.includes(part)));
}

async function check() {
  if (checking) {
    // The check that is under way comes to its end first.
    checking = 'stop';
    return occupy();
  }
  checking = true;
  occupy();
  $('check-go').textContent = 'Stop checking';
  const [table, bar, now, state] = [$('check-rows'), $('check-bar'), $('check-now'), $('check-state')];
  const body = table.tBodies[0];
  body.replaceChildren();
  state.textContent = '';
  table.hidden = bar.hidden = false;
  bar.value = 0;
  let [ok, wrong] = [0, 0];
  try {
    const all = await toCheck();
    bar.max = all.length;
    for (const [i, [name, run]] of all.entries()) {
      if (checking !== true) break;
      now.textContent = `${i + 1} of ${all.length}: ${name}`;
      const found = await run().catch((e) => ({ ok: false, what: e.message, lost: e.lost }));
      if (found.lost) checking = 'lost';
      // That the device is lost says nothing of a check.
      if (checking === 'lost') break;
      found.ok ? ok++ : wrong++;
      const row = body.insertRow();
      const head = element('th', name);
      head.scope = 'row';
      row.append(head, element('td', found.ok ? 'ok' : 'WRONG', found.ok ? 'ok' : 'bad'), element('td', found.what));
      bar.value = i + 1;
    }
    const whole = ok + wrong === all.length;
    const why = whole ? '' : checking === 'lost' ? 'the device was lost; ' : 'stopped; ';
    state.textContent = `${why}${wrong ? `${wrong} wrong, ${ok} ok` : whole ? `all ${ok} ok` : `${ok} ok`}`;
    state.className = wrong || checking === 'lost' ? 'bad' : whole ? 'ok' : '';
  } catch (e) {
    state.textContent = e.message;
    state.className = 'bad';
  }
  now.textContent = '';
  bar.hidden = true;
  checking = false;
  $('check-go').textContent = 'Check';
  occupy();
}

/// The browser's name and version, without what tells one visitor from another.
function browser() {
  const brand = navigator.userAgentData?.brands.find(({ brand }) => !/not.*brand/i.test(brand) && brand !== 'Chromium') ?? navigator.userAgentData?.brands.find(({ brand }) => brand === 'Chromium');
  const named = navigator.userAgent.match(/(Firefox|Version)\/(\d+)/);
  return brand ? `${brand.brand} ${brand.version}` : named ? `${named[1] === 'Version' ? 'Safari' : named[1]} ${named[2]}` : 'a browser';
}

const milliseconds = (ms) => `${ms >= 100 ? Math.round(ms) : ms.toPrecision(3)} ms`;

let file;
function showTimes(text) {
  file = text;
  const body = $('measure-rows').tBodies[0];
  const cases = JSON.parse(text).adapters.flatMap((adapter) => adapter.cases).filter((c) => c.outcome.status !== 'skipped');
  body.replaceChildren(...cases.map((c) => {
    const row = document.createElement('tr');
    const head = element('th', `${c.model}, ${c.tokens} tokens`);
    head.scope = 'row';
    const { outcome } = c;
    const of = outcome.status === 'measured' ? outcome.gpu ?? outcome.wall : undefined;
    const time = of ? element('td', milliseconds(of.median_ms), 'number') : element('td', outcome.status, 'bad');
    const clock = of ? (of === outcome.gpu ? 'GPU timestamps' : 'page’s clock') : outcome.reason;
    row.append(head, element('td', `${c.rule}: ${c.part}`), time, element('td', clock), element('td', of ? outcome.work.experts_per_block.toFixed(1) : '', 'number'));
    return row;
  }));
  $('measure-rows').hidden = $('save-json').hidden = $('save-page').hidden = cases.length === 0;
}

async function measure() {
  const [bar, now, state, notes] = [$('measure-bar'), $('measure-now'), $('measure-state'), $('measure-notes')];
  if (measuring) {
    now.textContent = 'stopping …';
    return call('stop');
  }
  measuring = true;
  occupy();
  $('measure-go').textContent = 'Stop measuring';
  bar.value = 0;
  bar.hidden = false;
  state.textContent = '';
  notes.replaceChildren();
  notes.hidden = true;
  let left = '';
  const told = {
    cases: (n) => { bar.max = n; },
    case: () => { bar.value += 1; },
    left: (seconds) => { left = `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, '0')}`; },
    say: (what) => { now.textContent = `at most ${left} left; ${what}`; },
    note: (what) => { notes.append(element('li', what)); notes.hidden = false; },
    report: showTimes,
  };
  try {
    showTimes(await call('measure', [Number($('seconds').value), browser()], (kind, value) => told[kind](value)));
    const { interrupted, adapters } = JSON.parse(file);
    const count = (status) => adapters.flatMap((a) => a.cases).filter((c) => c.outcome.status === status).length;
    const why = adapters.map((a) => a.failure).filter(Boolean).join('; ');
    state.textContent = `${interrupted ? 'stopped; ' : ''}${count('measured')} cases measured, ${count('failed')} failed, ${count('skipped')} skipped${count('skipped') ? ' (the file says why)' : ''}${why && `; ${why}`}`;
  } catch (e) {
    state.textContent = e.message;
  }
  now.textContent = '';
  bar.hidden = true;
  measuring = false;
  $('measure-go').textContent = 'Measure';
  occupy();
}

function save(name, type, text) {
  const a = document.createElement('a');
  a.href = URL.createObjectURL(new Blob([text], { type }));
  a.download = name;
  a.click();
  setTimeout(() => URL.revokeObjectURL(a.href), 10_000);
}

function failed(e) {
  $('device').textContent = e.message;
  $('device').className = 'wrong';
}

on('lost', lost);
on('stray', (what) => {
  $('device-said').textContent = `The browser reported an error that came of none of the page’s work: ${what}`;
  $('device-said').hidden = false;
});
on('died', (why) => {
  $('device-said').textContent = why;
  $('device-said').hidden = false;
});

try {
  const { rules, checks } = await call('start');
  names = ofTwins = checks;
  $('check-go').addEventListener('click', check);
  $('measure-go').addEventListener('click', measure);
  $('again').addEventListener('click', () => openDevice().catch(failed));
  $('save-json').addEventListener('click', () => save('wgmoe-bench.json', 'application/json', file));
  $('save-page').addEventListener('click', async () => save('wgmoe-bench.html', 'text/html', await call('reportPage', [file])));
  await see.start(rules);
  await openDevice();
} catch (e) {
  failed(e);
}
