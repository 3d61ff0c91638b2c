// The kernels and their twins, away from the page's own thread. A message is {id, call, args}; the answers to it are any
// number of {id, tell: [kind, value]}, then {id, value} or {id, error}, with `lost` where that is of the device's loss.
// {lost} and {stray} come by themselves: why the device is lost, and what the browser reported of nobody's work.
import init, { Session, measure, report_page, rules, stop } from './wgmoe_web.js';

/// How long a browser may take for an adapter, and for a device: some never answer.
const LIMIT = 20_000;

let device; // a session on the device, while there is one
let twins; // the same without a device

/// Work of the device runs one after the other, so that what the browser reports is told of the work that it came of.
let turn = Promise.resolve();
function inTurn(work) {
  const mine = turn.then(work);
  turn = mine.catch(() => {});
  return mine;
}

const onDevice = (work) => inTurn(async () => {
  const session = device ?? twins;
  try {
    return await work(session);
  } catch (e) {
    if (session.is_lost()) e.lost = true;
    throw e;
  } finally {
    for (const stray of session.stray()) postMessage({ stray });
  }
});

function inTime(promise, what) {
  let timer;
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(Object.assign(new Error(what), { late: true })), LIMIT);
  });
  return Promise.race([promise, late]).finally(() => clearTimeout(timer));
}

async function openDevice() {
  if (!self.isSecureContext) return { why: 'insecure' };
  if (!navigator.gpu) return { why: 'none' };
  try {
    // Some builds of Firefox have the name and refuse the call.
    if (!(await inTime(navigator.gpu.requestAdapter(), 'an adapter'))) return { why: 'no device' };
    const opened = await inTime(Session.open(true), 'a device');
    device = opened;
    opened.lost().then((lost) => {
      if (device === opened) device = undefined;
      postMessage({ lost });
    });
    return { about: JSON.parse(opened.about()), checks: JSON.parse(opened.checks()) };
  } catch (e) {
    const detail = e?.message ?? String(e);
    return e?.late ? { why: 'late', detail: `${detail} within ${LIMIT / 1000} seconds` } : { why: 'refused', detail };
  }
}

const calls = {
  /// The twins, and the rules that they and the device can show.
  async start() {
    await init({ module_or_path: new URL('wgmoe_web_bg.wasm', import.meta.url) });
    twins = await Session.open(false);
    return { rules: JSON.parse(rules()), checks: JSON.parse(twins.checks()) };
  },
  /// The device, or why there is none.
  open: () => inTurn(openDevice),
  async recorded(name) {
    const answer = await fetch(`golden/${name}`);
    if (!answer.ok) throw new Error(`${name}: ${answer.status}`);
    const bytes = new Uint8Array(await answer.arrayBuffer());
    return JSON.parse(await onDevice((session) => session.check_recorded(name.replace(/\.safetensors$/, ''), bytes)));
  },
  async check(i) {
    return JSON.parse(await onDevice((session) => session.check(i)));
  },
  async route(settings, onTwins) {
    const route = (session) => session.route(JSON.stringify(settings));
    const picture = await (onTwins ? route(twins) : onDevice(route));
    const { scores, gates, chosen, elected, masked, numbers } = picture;
    picture.free();
    return { scores, gates, chosen, elected, masked, numbers: JSON.parse(numbers) };
  },
  /// On a device of its own.
  measure: (seconds, browser, tell) => inTurn(() => measure(seconds, browser, tell)),
  stop,
  reportPage: report_page,
};

// A panic of the kernels' code ends it: whoever waits must hear of it.
const dead = (e) => postMessage({ dead: e.message ?? e.reason?.message ?? String(e.reason ?? e) });
self.addEventListener('error', dead);
self.addEventListener('unhandledrejection', dead);

self.onmessage = async ({ data: { id, call, args } }) => {
  try {
    const tell = (...told) => postMessage({ id, tell: told });
    postMessage({ id, value: await calls[call](...args, ...(call === 'measure' ? [tell] : [])) });
  } catch (e) {
    postMessage({ id, error: String(e?.message ?? e), lost: e?.lost ?? false });
  }
};
