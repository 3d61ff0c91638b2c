// The kernels and their twins, away from the page's own thread. A message is {id, call, args}; the answers to it are any
// number of {id, tell: [kind, value]}, then {id, value} or {id, error}.
import init, { Session, measure, report_page, stop } from './wgmoe_web.js';

let session;
let twins; // the same without a device

const calls = {
  async open() {
    await init({ module_or_path: new URL('wgmoe_web_bg.wasm', import.meta.url) });
    let why;
    let detail;
    if (!self.isSecureContext) why = 'insecure';
    else if (!navigator.gpu) why = 'none';
    else {
      try {
        // Some builds of Firefox have the name and refuse the call.
        if (await navigator.gpu.requestAdapter()) session = await Session.open(true);
        else why = 'no device';
      } catch (e) {
        [why, detail] = ['refused', e.message ?? String(e)];
      }
    }
    twins = await Session.open(false);
    session ??= twins;
    return { why, detail, about: JSON.parse(session.about()), checks: JSON.parse(session.checks()) };
  },
  async recorded(name) {
    const answer = await fetch(`golden/${name}`);
    if (!answer.ok) throw new Error(`${name}: ${answer.status}`);
    return JSON.parse(await session.check_recorded(name.replace(/\.safetensors$/, ''), new Uint8Array(await answer.arrayBuffer())));
  },
  async check(i) {
    return JSON.parse(await session.check(i));
  },
  async route(settings, onTwins) {
    const picture = await (onTwins ? twins : session).route(JSON.stringify(settings));
    const { scores, gates, chosen, elected, masked, numbers } = picture;
    picture.free();
    return { scores, gates, chosen, elected, masked, numbers: JSON.parse(numbers) };
  },
  measure(seconds, browser, tell) {
    return measure(seconds, browser, tell);
  },
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
    postMessage({ id, error: String(e?.message ?? e) });
  }
};
