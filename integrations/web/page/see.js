// The picture: one block's scores and choices, routed by the kernels whenever a control moves.
import { call } from './kernels.js';

const $ = (id) => document.getElementById(id);
const form = $('controls');
const canvas = $('picture');
const sliders = ['k', 'p', 'floor', 'capacity', 'mask'];
const still = matchMedia('(prefers-reduced-motion: reduce)');
const TOKENS = 32;
const SETTLE = 260; // milliseconds that a change takes to be drawn

let block = 1;
let picture; // what was routed last
let from; // what each cell showed before, 0 to 1 chosen
let began = 0;
let frame = 0;
let cursor;
let busy = false;
let again = false;
let playing = 0;
let rules; // by id, as the kernels tell them
let device = 'none'; // or 'opening', 'cold' until it has routed once, 'ready'
let shared = false; // the checks have the device too

function settings() {
  const number = (name) => Number(form.elements[name].value);
  const experts = number('experts');
  return {
    rule: form.elements.rule.value, experts, block, k: number('k'), p: number('p'),
    floor: Math.min(number('floor'), experts), capacity: Math.min(number('capacity'), experts), mask: number('mask'),
  };
}

function showControls() {
  const rule = rules[form.elements.rule.value];
  const { experts } = settings();
  $('capacity').max = experts;
  for (const id of sliders) {
    const input = $(id);
    input.disabled = !rule.uses.includes(id);
    const value = Number(input.value);
    const text = id === 'mask' ? `${Math.round(value * 100)} %` : id === 'p' ? value.toFixed(2) : String(value);
    input.nextElementSibling.textContent = text;
    input.setAttribute('aria-valuetext', text);
  }
  $('k').previousElementSibling.textContent = rule.id === 'expert_choice' ? 'K: experts a token, at the end' : 'K: experts of a token';
  const sources = rule.sources.map(({ href, name }, i) => {
    const a = document.createElement('a');
    a.href = href;
    a.textContent = name;
    return i ? [', ', a] : [a];
  });
  $('rule-words').replaceChildren(rule.words, ' (', ...sources.flat(), ')');
}

/// What expert choice makes of K and the mask ratio: at few tokens an expert, one token each is more than K asks for.
function ofExperts({ k_now: k, capacity, tokens, experts }) {
  const share = (tokens * k) / experts;
  const rounded = share < 1 ? 'less than one token, so one' : share === capacity ? String(capacity) : `${share.toFixed(1)}, so ${capacity}`;
  return `At this mask ratio K is ${k}: each expert takes ${tokens} × ${k} / ${experts} tokens, that is ${rounded}.`;
}

const megabytes = (bytes) => (bytes >= 1e9 ? `${(bytes / 1e9).toFixed(2)} GB` : `${Math.round(bytes / 1e6)} MB`);

function showNumbers(n, waitsForDevice) {
  const text = {
    'experts-read': `${n.experts_read} of ${n.experts}`,
    'bytes-read': `${megabytes(n.bytes_read)} of ${megabytes(n.bytes_of_all)}`,
    elected: n.elected === null ? 'no election' : `${n.elected} of ${n.experts}`,
    slots: `${n.slots}, ${(n.slots / n.tokens).toFixed(1)} a token`,
    untouched: String(n.untouched),
    'largest-load': `${n.largest_load} token${n.largest_load === 1 ? '' : 's'}`,
    capacity: `${n.capacity} token${n.capacity === 1 ? '' : 's'}`,
    twin: n.on_device ? (n.differs ? `differs: ${n.differs}` : 'the same') : waitsForDevice ? 'the CPU’s; yours comes' : 'this is the CPU',
  };
  for (const [id, value] of Object.entries(text)) $(`${id}-now`).textContent = value;
  $('twin-now').className = n.differs ? 'bad' : '';
  $('capacity-of').hidden = $('experts-words').hidden = n.capacity === null;
  $('experts-words').textContent = n.capacity === null ? '' : ofExperts(n);
  canvas.setAttribute('aria-label', `Picture of ${n.tokens} tokens and ${n.experts} experts`);
  // Told when it has come to rest: while a slider moves, each step would be.
  clearTimeout(telling);
  if (!playing && !waitsForDevice) telling = setTimeout(tell, 900);
}

let telling = 0;
function tell() {
  const rows = [...document.querySelectorAll('#see-numbers div:not([hidden])')];
  $('see-told').textContent = `${rows.map((row) => `${row.firstElementChild.textContent}: ${row.lastElementChild.textContent}`).join('; ')}.`;
}

/// Where the parts of the picture lie, in CSS pixels.
function layout() {
  const experts = picture.numbers.experts;
  const left = 16, top = 10, loads = 48, right = 6;
  const width = canvas.parentElement.clientWidth;
  const cell = Math.max((width - left - right) / experts, experts > 64 ? 4 : 5);
  const row = Math.max(8, Math.min(13, cell));
  return { left, top, cell, row, experts, grid: TOKENS * row, loads, width: left + right + cell * experts, height: top + TOKENS * row + loads + 8 };
}

const mix = (a, b, t) => a.map((v, i) => Math.round(v + (b[i] - v) * t));
function color(name) {
  const hex = getComputedStyle(document.documentElement).getPropertyValue(name).trim().slice(1);
  const long = hex.length === 3 ? [...hex].map((c) => c + c).join('') : hex;
  return [0, 2, 4].map((i) => parseInt(long.slice(i, i + 2), 16));
}
const css = (c, a = 1) => `rgb(${c[0]} ${c[1]} ${c[2]} / ${a})`;

function draw(now) {
  frame = 0;
  if (!picture) return;
  const t = still.matches ? 1 : Math.min(1, (now - began) / SETTLE);
  const at = 1 - (1 - t) ** 3;
  const { left, top, cell, row, experts, grid, loads, width, height } = layout();
  const scale = devicePixelRatio || 1;
  if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
  }
  const g = canvas.getContext('2d');
  g.setTransform(scale, 0, 0, scale, 0, 0);
  g.clearRect(0, 0, width, height);
  const [box, blue, orange, soft, text, mark] = ['--box', '--score', '--chosen', '--soft', '--text', '--mark'].map(color);
  const edge = 1;
  const { scores, chosen, elected, masked } = picture;
  const gap = cell > 7 ? 1 : 0.5;
  const count = new Float32Array(experts);
  for (let t = 0; t < TOKENS; t++) {
    for (let e = 0; e < experts; e++) {
      const i = t * experts + e;
      const is = from ? from[i] + (chosen[i] - from[i]) * at : chosen[i];
      count[e] += is;
      // Low scores are most of them: the square root spreads them.
      let fill = mix(box, blue, 0.04 + 0.6 * Math.sqrt(scores[i]));
      if (elected.length && !elected[e]) fill = mix(fill, box, 0.55);
      g.fillStyle = css(mix(fill, orange, is));
      g.fillRect(left + e * cell, top + t * row, cell - gap, row - gap);
      if (is > 0.02) {
        // A dark edge: told without colours too.
        g.strokeStyle = css(mark, is);
        g.lineWidth = edge;
        g.strokeRect(left + e * cell + edge / 2, top + t * row + edge / 2, cell - gap - edge, row - gap - edge);
      }
    }
    g.beginPath();
    g.arc(left / 2, top + (t + 0.5) * row, Math.min(3, row / 3), 0, 7);
    g.strokeStyle = css(soft);
    g.fillStyle = css(soft);
    g.lineWidth = 1.4;
    if (masked[t]) g.stroke(); else if (picture.usesMask) g.fill();
  }
  const most = Math.max(8, ...count);
  for (let e = 0; e < experts; e++) {
    if (elected[e]) {
      g.fillStyle = css(orange);
      g.fillRect(left + e * cell, top - 6, cell - gap, 3);
    }
    g.fillStyle = css(soft);
    const high = (count[e] / most) * loads;
    g.fillRect(left + e * cell, top + grid + 4, cell - gap, high);
  }
  if (cursor) {
    for (const [c, grow] of [[box, 2], [text, 4]]) {
      g.strokeStyle = css(c);
      g.lineWidth = 2;
      g.strokeRect(left + cursor.e * cell - grow / 2, top + cursor.t * row - grow / 2, cell - gap + grow, row - gap + grow);
    }
  }
  if (t < 1) frame = requestAnimationFrame(draw);
}

function redraw() {
  frame ||= requestAnimationFrame(draw);
}

function showCell() {
  if (!cursor || !picture) return;
  const { t, e } = cursor;
  const i = t * picture.numbers.experts + e;
  const score = picture.scores[i].toFixed(2);
  const chosen = picture.chosen[i] ? `chosen, with gate ${picture.gates[i].toFixed(2)}` : 'not chosen';
  $('cell').textContent = `Token ${t + 1}, expert ${e + 1}: score ${score}, ${chosen}.`;
}

/// Routes by the device, or by the twins where there is none or it refuses; and shows it.
async function routeBy(wanted, onTwins, waitsForDevice) {
  const next = await call('route', [wanted, onTwins]);
  const same = picture && picture.chosen.length === next.chosen.length;
  from = same ? Float32Array.from(picture.chosen) : undefined;
  next.usesMask = rules[wanted.rule].uses.includes('mask');
  if (!next.usesMask) next.masked.fill(0);
  if (!same) cursor = undefined;
  picture = next;
  began = performance.now();
  showNumbers(next.numbers, waitsForDevice);
  showCell();
  canvas.dataset.routed = Number(canvas.dataset.routed ?? 0) + 1;
  document.documentElement.dataset.firstPicture ??= Math.round(performance.now());
  redraw();
}

async function route() {
  showControls();
  if (busy) {
    again = true;
    return;
  }
  busy = true;
  canvas.setAttribute('aria-busy', 'true');
  do {
    again = false;
    const wanted = settings();
    const by = device;
    try {
      const has = by === 'cold' || by === 'ready';
      // The twins answer at once. The device compiles its kernels first, and where it has checks to make, they come between.
      if (!has || by === 'cold' || shared) await routeBy(wanted, true, has || by === 'opening');
      if (has) {
        await routeBy(wanted, false, false);
        if (device === 'cold') device = 'ready';
      }
      showError();
    } catch (e) {
      // Lost: whoever hears of it says so, and the twins go on.
      if (e.lost) {
        device = 'none';
        again = true;
      } else if (by === 'ready' || by === 'cold') {
        showError(`Your device did not route this: ${e.message} What you see is by the CPU.`);
        await routeBy(wanted, true, false).catch((e) => showError(e.message));
      } else showError(e.message);
    }
    if (by !== 'opening') document.documentElement.dataset.ready ??= Math.round(performance.now());
  } while (again);
  busy = false;
  canvas.setAttribute('aria-busy', 'false');
}

function showError(text = '') {
  $('see-error').textContent = text;
  $('see-error').hidden = !text;
}

function stopPlaying() {
  clearInterval(playing);
  playing = 0;
  $('play').setAttribute('aria-pressed', 'false');
}

/// Moves the rule's own slider from one end to the other and back; the mask ratio only down, as text is written.
function play() {
  if (playing) return stopPlaying();
  let step = 1;
  $('play').setAttribute('aria-pressed', 'true');
  playing = setInterval(() => {
    const name = rules[form.elements.rule.value].play;
    const input = $(name);
    const [min, max, size] = [input.min, input.max, input.step || 1].map(Number);
    const stride = Math.max(size, Math.round((max - min) / 32 / size) * size);
    if (name === 'mask') {
      input.value = Number(input.value) <= min ? max : Number(input.value) - stride;
    } else {
      if (Number(input.value) >= max) step = -1;
      if (Number(input.value) <= min) step = 1;
      input.value = Number(input.value) + step * stride;
    }
    route();
  }, 350);
}

function point(event) {
  if (!picture) return;
  const { left, top, cell, row, experts } = layout();
  const box = canvas.getBoundingClientRect();
  const e = Math.floor((event.clientX - box.left - left) / cell);
  const t = Math.floor((event.clientY - box.top - top) / row);
  if (e < 0 || t < 0 || e >= experts || t >= TOKENS) return;
  cursor = { t, e };
  showCell();
  redraw();
}

/// Moves from cell to cell: by one, or to the end of a row or a column.
function move(event) {
  const step = {
    ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0],
    Home: [0, -Infinity], End: [0, Infinity], PageUp: [-Infinity, 0], PageDown: [Infinity, 0],
  }[event.key];
  if (!step || !picture || event.ctrlKey || event.altKey || event.metaKey) return;
  event.preventDefault();
  const { experts, left, cell } = layout();
  const inside = (v, most) => Math.max(0, Math.min(most - 1, v));
  cursor = cursor ? { t: inside(cursor.t + step[0], TOKENS), e: inside(cursor.e + step[1], experts) } : { t: 0, e: 0 };
  const holder = canvas.parentElement;
  const x = left + cursor.e * cell;
  if (x < holder.scrollLeft || x + cell > holder.scrollLeft + holder.clientWidth) holder.scrollLeft = x - holder.clientWidth / 2;
  showCell();
  $('cell-told').textContent = $('cell').textContent;
  redraw();
}

/// While something else has the device, nothing here moves.
export function pause(paused) {
  if (paused && playing) stopPlaying();
  $('see-set').disabled = paused;
}

/// While the checks run too, the twins' picture comes first.
export function share(with_checks) {
  shared = with_checks;
}

/// What routes from now on: 'none' (the twins), 'opening' (they, until the device comes), 'cold' (the device).
export function use(what) {
  device = what;
  return route();
}

/// The first picture, by the twins.
export function start(list) {
  rules = Object.fromEntries(list.map((rule) => [rule.id, rule]));
  $('rule').append(...list.map(({ id, name }) => new Option(name, id, id === 'mass', id === 'mass')));
  form.addEventListener('input', route);
  form.addEventListener('submit', (event) => event.preventDefault());
  $('another').addEventListener('click', () => { block++; route(); });
  $('play').addEventListener('click', play);
  canvas.addEventListener('pointermove', point);
  canvas.addEventListener('pointerdown', point);
  canvas.addEventListener('keydown', move);
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', redraw);
  new ResizeObserver(redraw).observe(canvas.parentElement);
  return use('opening');
}
