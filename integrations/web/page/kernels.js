// Calls into the worker that runs the kernels.
const worker = new Worker('worker.js', { type: 'module' });
const waiting = new Map();
const listeners = {};
let last = 0;
let died;

const end = (why) => {
  died = new Error(why);
  for (const { reject } of waiting.values()) reject(died);
  waiting.clear();
  listeners.died?.(why);
};
worker.onerror = (e) => end(`The kernels could not be loaded, or stopped: ${e.message ?? 'no reason given'}. Load the page again.`);
worker.onmessage = ({ data }) => {
  if (data.dead) return end(`The kernels stopped: ${data.dead}. Load the page again.`);
  for (const kind of ['lost', 'stray']) if (data.id === undefined && kind in data) return listeners[kind]?.(data[kind]);
  const call = waiting.get(data.id);
  if (!call) return;
  if (data.tell) return call.tell?.(...data.tell);
  waiting.delete(data.id);
  if ('error' in data) call.reject(Object.assign(new Error(data.error), { lost: data.lost }));
  else call.resolve(data.value);
};

/// Hears what comes by itself: `lost` and `stray` of the device, `died` of the kernels' code.
export function on(kind, hear) {
  listeners[kind] = hear;
}

export function call(name, args = [], tell) {
  if (died) return Promise.reject(died);
  return new Promise((resolve, reject) => {
    waiting.set(++last, { resolve, reject, tell });
    worker.postMessage({ id: last, call: name, args });
  });
}
