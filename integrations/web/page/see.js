// The picture: one block's scores and choices, routed by the kernels whenever a control moves.
import { call } from './kernels.js';
import { rules } from './rules.js';

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
let ready = false; // the device has routed once

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
  const sources = rule.sources.map(({ href, name }, i) => {
    const a = document.createElement('a');
    a.href = href;
    a.textContent = name;
    return i ? [', ', a] : [a];
  });
  $('rule-words').replaceChildren(rule.words, ' (', ...sources.flat(), ')');
}

const megabytes = (bytes) => (bytes >= 1e9 ? `${(bytes / 1e9).toFixed(2)} GB` : `${Math.round(bytes / 1e6)} MB`);

function showNumbers(n) {
  const text = {
    'experts-read': `${n.experts_read} of ${n.experts}`,
    'bytes-read': `${megabytes(n.bytes_read)} of ${megabytes(n.bytes_of_all)}`,
    elected: n.elected === null ? 'no election' : `${n.elected} of ${n.experts}`,
    slots: `${n.slots}, ${(n.slots / n.tokens).toFixed(1)} a token`,
    untouched: String(n.untouched),
    'largest-load': `${n.largest_load} token${n.largest_load === 1 ? '' : 's'}`,
    twin: n.on_device ? (n.same_as_twin ? 'the same' : 'differs') : ready ? 'this is the CPU' : 'the CPU’s; yours comes',
  };
  for (const [id, value] of Object.entries(text)) $(id).textContent = value;
  $('twin').className = n.same_as_twin ? '' : 'bad';
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
  const [box, blue, orange, soft] = ['--box', '--score', '--chosen', '--soft'].map(color);
  const { scores, chosen, elected, masked } = picture;
  const gap = cell > 7 ? 1 : 0.5;
  const count = new Float32Array(experts);
  for (let t = 0; t < TOKENS; t++) {
    for (let e = 0; e < experts; e++) {
      const i = t * experts + e;
      const is = from ? from[i] + (chosen[i] - from[i]) * at : chosen[i];
      count[e] += is;
      // Low scores are most of them: the square root spreads them.
      let fill = mix(box, blue, 0.04 + 0.8 * Math.sqrt(scores[i]));
      if (elected.length && !elected[e]) fill = mix(fill, box, 0.55);
      g.fillStyle = css(mix(fill, orange, is));
      g.fillRect(left + e * cell, top + t * row, cell - gap, row - gap);
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
    g.strokeStyle = css(color('--text'));
    g.lineWidth = 2;
    g.strokeRect(left + cursor.e * cell - 1, top + cursor.t * row - 1, cell - gap + 2, row - gap + 2);
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
    try {
      // The twins answer at once; the device compiles its kernels first.
      const first = !picture;
      const next = await call('route', [wanted, first]);
      again ||= first;
      ready ||= !first;
      const same = picture && picture.chosen.length === next.chosen.length;
      from = same ? Float32Array.from(picture.chosen) : undefined;
      next.usesMask = rules[wanted.rule].uses.includes('mask');
      if (!next.usesMask) next.masked.fill(0);
      if (!same) cursor = undefined;
      picture = next;
      began = performance.now();
      showNumbers(next.numbers);
      showCell();
      $('see-error').hidden = true;
      canvas.dataset.routed = Number(canvas.dataset.routed ?? 0) + 1;
      document.documentElement.dataset.firstPicture ??= Math.round(performance.now());
    } catch (e) {
      $('see-error').textContent = e.message;
      $('see-error').hidden = false;
    }
    redraw();
  } while (again);
  busy = false;
  canvas.setAttribute('aria-busy', 'false');
}

function stopPlaying() {
  clearInterval(playing);
  playing = 0;
  $('play').textContent = 'Play';
  $('play').setAttribute('aria-pressed', 'false');
}

/// Moves the rule's own slider from one end to the other and back; the mask ratio only down, as text is written.
function play() {
  if (playing) return stopPlaying();
  let step = 1;
  $('play').textContent = 'Stop';
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

function arrow(event) {
  const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
  if (!step || !picture) return;
  event.preventDefault();
  const { experts, left, cell } = layout();
  const inside = (v, most) => Math.max(0, Math.min(most - 1, v));
  cursor = cursor ? { t: inside(cursor.t + step[0], TOKENS), e: inside(cursor.e + step[1], experts) } : { t: 0, e: 0 };
  const holder = canvas.parentElement;
  const x = left + cursor.e * cell;
  if (x < holder.scrollLeft || x + cell > holder.scrollLeft + holder.clientWidth) holder.scrollLeft = x - holder.clientWidth / 2;
  showCell();
  redraw();
}

/// While something else has the device, nothing here moves.
export function pause(paused) {
  if (paused && playing) stopPlaying();
  $('see-set').disabled = paused;
}

export function start() {
  $('rule').append(...Object.entries(rules).map(([value, { name }]) => new Option(name, value, value === 'mass', value === 'mass')));
  form.addEventListener('input', route);
  form.addEventListener('submit', (event) => event.preventDefault());
  $('another').addEventListener('click', () => { block++; route(); });
  $('play').addEventListener('click', play);
  canvas.addEventListener('pointermove', point);
  canvas.addEventListener('pointerdown', point);
  canvas.addEventListener('keydown', arrow);
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', redraw);
  new ResizeObserver(redraw).observe(canvas.parentElement);
  return route();
}
