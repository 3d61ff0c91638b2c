// Calls into the worker that runs the kernels.
const worker = new Worker('worker.js', { type: 'module' });
const waiting = new Map();
let last = 0;
let died;

const end = (why) => {
  died = new Error(why);
  for (const { reject } of waiting.values()) reject(died);
  waiting.clear();
};
worker.onerror = (e) => end(`the kernels could not be loaded, or stopped: ${e.message ?? 'no reason given'}`);
worker.onmessage = ({ data }) => {
  if (data.dead) return end(`the kernels stopped: ${data.dead}. Load the page again.`);
  const call = waiting.get(data.id);
  if (!call) return;
  if (data.tell) return call.tell?.(...data.tell);
  waiting.delete(data.id);
  if ('error' in data) call.reject(new Error(data.error));
  else call.resolve(data.value);
};

export function call(name, args = [], tell) {
  if (died) return Promise.reject(died);
  return new Promise((resolve, reject) => {
    waiting.set(++last, { resolve, reject, tell });
    worker.postMessage({ id: last, call: name, args });
  });
}
