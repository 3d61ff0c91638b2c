// Opens the page in a headless Chromium and uses it as a visitor does: real clicks, keys and a dragged slider.
//
//   npm ci --ignore-scripts && node --test page.test.mjs
//
// FOLDER: where the page was built (../dist). BROWSER: a Chromium; else the first of the usual names on the PATH.
// SHOTS: a folder for pictures of the page at two widths, light and dark. RESULTS: a file for what was measured. SHORT=1 makes
// fewer checks, and measures briefly. FIREFOX: a Firefox with WebGPU, in place of Chromium; what only Chromium's protocol can do
// to a page (dark colours, names as a screen reader has them, a device that is lost) is left out then.
import assert from 'node:assert/strict';
import { accessSync, constants, mkdirSync, mkdtempSync, readFileSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:http';
import { tmpdir } from 'node:os';
import { delimiter, dirname, join } from 'node:path';
import { after, before, test } from 'node:test';
import { fileURLToPath } from 'node:url';
import puppeteer from 'puppeteer-core';
import sirv from 'sirv';

const folder = process.env.FOLDER ?? join(dirname(fileURLToPath(import.meta.url)), '../dist');
const short = process.env.SHORT === '1';
const firefox = process.env.FIREFOX;
const minutes = 60_000;
/// The checks that SHORT=1 makes: recorded layers, a rule of each kind, a type of weights in blocks.
const few = ['recorded: group_limited_00', 'recorded: block_coreset_00', 'token choice', 'expert choice', 'block mass', 'sequence top', 'weights in Q4_0'];
/// The numbers that each rule uses.
const numbers = {
  token_choice: ['k'], expert_choice: ['k', 'mask'], sequence_top: ['k'], mass: ['k', 'p', 'floor'], capacity: ['k', 'capacity'],
  vote: ['k', 'capacity'], union: ['k'], masked_union: ['k', 'mask'],
};
/// What the worker runs before its own code: the devices it is given are kept, so that a test can do to them what drivers do.
const keepDevices = `if (self.GPUAdapter) {
  const request = GPUAdapter.prototype.requestDevice;
  self.devices = [];
  GPUAdapter.prototype.requestDevice = async function (...args) {
    const device = await request.apply(this, args);
    self.devices.push(device);
    return device;
  };
}
`;
/// A browser that never answers, and does not take long about it.
const neverAnswers = `Object.defineProperty(navigator, 'gpu', { value: { requestAdapter: () => new Promise(() => {}) } });
{ const set = self.setTimeout; self.setTimeout = (f, ms) => set(f, ms === 20_000 ? 500 : ms); }
`;

function browserPath() {
  if (process.env.BROWSER) return process.env.BROWSER;
  const names = ['chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable'];
  const paths = process.env.PATH.split(delimiter).flatMap((d) => names.map((name) => join(d, name)));
  return paths.find((path) => {
    try {
      accessSync(path, constants.X_OK);
      return true;
    } catch {
      return false;
    }
  });
}

let server;
let url;
let before_worker = '';
before(async () => {
  const files = sirv(folder, { dev: true });
  server = createServer((request, response) => {
    if (request.url !== '/worker.js') return files(request, response);
    response.setHeader('content-type', 'text/javascript');
    response.end(before_worker + readFileSync(join(folder, 'worker.js'), 'utf8'));
  });
  await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve));
  url = `http://localhost:${server.address().port}/`;
});
after(() => server.close());

/// A browser whose downloads go to a folder.
async function launch(webgpu, downloads) {
  if (firefox) {
    // Software drivers are on its blocklist.
    const extraPrefsFirefox = {
      'dom.webgpu.enabled': webgpu, 'gfx.webgpu.ignore-blocklist': true, 'browser.download.folderList': 2, 'browser.download.dir': downloads, 'browser.download.useDownloadDir': true,
    };
    return puppeteer.launch({ browser: 'firefox', executablePath: firefox, extraPrefsFirefox, protocolTimeout: 10 * minutes });
  }
  const flags = webgpu ? ['--enable-unsafe-webgpu'] : ['--disable-features=WebGPUService', '--disable-gpu'];
  const browser = await puppeteer.launch({ executablePath: browserPath(), args: ['--no-sandbox', ...flags], protocolTimeout: 10 * minutes });
  const session = await browser.target().createCDPSession();
  await session.send('Browser.setDownloadBehavior', { behavior: 'allow', downloadPath: downloads });
  return browser;
}

/// A page that is ready, and what its console and its network had to say.
async function open(t, webgpu, { before = keepDevices, only } = {}) {
  before_worker = before;
  const downloads = mkdtempSync(join(tmpdir(), 'wgmoe-web.'));
  const browser = await launch(webgpu, downloads);
  t.after(async () => {
    await browser.close();
    rmSync(downloads, { recursive: true, force: true });
  });
  const page = await browser.newPage();
  const said = [];
  const elsewhere = [];
  page.on('console', (message) => ['error', 'warn'].includes(message.type()) && said.push(message.text()));
  page.on('pageerror', (error) => said.push(error.message));
  page.on('request', (request) => !/^(data|blob):/.test(request.url()) && !request.url().startsWith(url) && elsewhere.push(request.url()));
  await page.setViewport({ width: 1280, height: 900 });
  await page.goto(only ? `${url}?check=${encodeURIComponent(only.join(','))}` : url);
  await page.waitForFunction(() => 'ready' in document.documentElement.dataset || document.querySelector('#device.wrong'), { timeout: 3 * minutes, polling: 100 });
  const text = (id) => page.$eval(`#${id}`, (e) => e.textContent);
  const routed = () => page.$eval('#picture', (e) => Number(e.dataset.routed));
  /// What an act changes, once the block has been routed anew.
  const afterwards = async (act, read = () => text('experts-read-now')) => {
    const [before, count] = [await read(), await routed()];
    await act();
    await page.waitForFunction((n) => {
      const { dataset, ariaBusy } = document.getElementById('picture');
      return Number(dataset.routed) > n && ariaBusy === 'false';
    }, { timeout: 2 * minutes, polling: 50 }, count);
    return [before, await read()];
  };
  /// Puts a slider at a value, by keys: from its start on.
  const slide = async (id, steps) => {
    await page.focus(`#${id}`);
    await page.keyboard.press('Home');
    for (let i = 0; i < steps; i++) await page.keyboard.press('ArrowRight');
  };
  return { page, said, elsewhere, downloads, text, afterwards, slide };
}

const checked = (page) => page.waitForFunction(() => document.getElementById('check-go').textContent === 'Check', { timeout: 10 * minutes, polling: 100 });
const rowsOf = (page) => page.$$eval('#check-rows tbody tr', (all) => all.map((row) => [...row.children].map((cell) => cell.textContent)));

async function checkAll({ page, text }) {
  await page.click('#check-go');
  await checked(page);
  const rows = await rowsOf(page);
  for (const row of rows) assert.equal(row[1], 'ok', row.join(': '));
  assert.equal(await text('check-state'), `all ${rows.length} ok`);
  return rows;
}

async function download(folder, name) {
  for (let i = 0; i < 100; i++) {
    if (readdirSync(folder).includes(name)) return readFileSync(join(folder, name), 'utf8');
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
  throw new Error(`${name} was not saved; there are ${readdirSync(folder)}`);
}

test('the kernels, on a device', { timeout: 20 * minutes }, async (t) => {
  const visit = await open(t, true, { only: short ? few : undefined });
  const { page, said, elsewhere, downloads, text, afterwards, slide } = visit;
  const since = (what) => page.evaluate((what) => document.documentElement.dataset[what], what);
  t.diagnostic(`${await text('device')} First picture after ${await since('firstPicture')} ms, the device's own after ${await since('ready')} ms.`);
  assert.match(await text('device'), /through WebGPU/);
  assert.match(await text('limits'), /Largest binding/);
  assert.equal(await text('twin-now'), 'the same');
  assert.match(await page.evaluate(() => fetch('THIRD-PARTY.txt').then((answer) => answer.text())), /^wgpu 30\S+, https:\S+: MIT OR Apache-2\.0$/m);

  await t.test('a slider that is dragged moves the picture and its numbers', async () => {
    const slider = await (await page.$('#k')).boundingBox();
    const middle = slider.y + slider.height / 2;
    const at = (share) => slider.x + slider.width * share;
    const share = await page.$eval('#k', (e) => (e.value - e.min) / (e.max - e.min));
    const pixels = () => page.$eval('#picture', (e) => e.toDataURL());
    const [before, slots] = [await pixels(), await text('slots-now')];
    await afterwards(async () => {
      await page.mouse.move(at(share), middle);
      await page.mouse.down();
      await page.mouse.move(at(0.9), middle, { steps: 5 });
      await page.mouse.up();
    });
    await page.waitForFunction((slots) => document.getElementById('slots-now').textContent !== slots, { timeout: minutes }, slots);
    const k = Number(await page.$eval('#k', (e) => e.value));
    assert.ok(k > 10);
    await new Promise((resolve) => setTimeout(resolve, 500));
    assert.notEqual(await pixels(), before);
    assert.equal(await text('twin-now'), 'the same');
  });

  await t.test('every rule routes as the twin does, and only its own numbers can be moved', async () => {
    assert.deepEqual(await page.$$eval('#rule option', (all) => all.map((o) => o.value)), Object.keys(numbers));
    await afterwards(() => slide('k', 1));
    assert.equal(await page.$eval('#k', (e) => e.value), '2');
    const some = ['mass', 'masked_union']; // and expert choice below
    for (const rule of short ? some : Object.keys(numbers)) {
      if ((await page.$eval('#rule', (e) => e.value)) !== rule) await afterwards(() => page.select('#rule', rule));
      assert.equal(await text('twin-now'), 'the same', rule);
      assert.match(await text('rule-words'), /\(.+\)$/, rule);
      const elects = ['mass', 'capacity', 'vote', 'union', 'masked_union'].includes(rule);
      assert.equal(/of 64/.test(await text('elected-now')), elects, rule);
      const free = await page.$$eval('.sliders input:enabled', (all) => all.map((e) => e.id));
      assert.deepEqual(free, numbers[rule], rule);
    }
    const [all, none] = await afterwards(() => slide('mask', 0));
    assert.notEqual(all, none, 'fewer voters, another coreset');
  });

  await t.test('expert choice says how many tokens an expert takes', async () => {
    await afterwards(() => page.select('#rule', 'expert_choice'));
    // K 2 of 64 experts and 32 tokens: one token each.
    assert.equal(await text('capacity-now'), '1 token');
    assert.match(await text('experts-words'), /K is 2: each expert takes 32 × 2 \/ 64 tokens, that is 1\.$/);
    assert.equal(await text('largest-load-now'), '1 token');
    await afterwards(() => slide('k', 0));
    assert.match(await text('experts-words'), /K is 1: .* that is less than one token, so one\.$/);
    await afterwards(() => slide('k', 15));
    assert.equal(await text('capacity-now'), '8 tokens');
    assert.equal(await text('largest-load-now'), '8 tokens');
    await afterwards(() => page.select('#rule', 'mass'));
    assert.ok(await page.$eval('#capacity-of', (e) => e.hidden));
  });

  await t.test('the picture by keyboard, another block, and playing', async () => {
    await page.focus('#picture');
    await page.keyboard.press('ArrowRight');
    await page.keyboard.press('ArrowRight');
    assert.match(await text('cell'), /^Token 1, expert 2: score \d\.\d\d/);
    await page.keyboard.press('PageDown');
    await page.keyboard.press('End');
    assert.match(await text('cell-told'), /^Token 32, expert 64: score/);
    const [one, another] = await afterwards(() => page.click('#another'), () => text('cell'));
    assert.notEqual(one, another, 'another block has other scores');
    // What has changed is told once it rests.
    await page.waitForFunction(() => document.getElementById('see-told').textContent.includes(document.getElementById('experts-read-now').textContent), { timeout: 10_000 });
    const still = await page.$eval('#picture', (e) => Number(e.dataset.routed));
    const pressed = (is) => page.waitForFunction((is) => document.getElementById('play').getAttribute('aria-pressed') === is, { timeout: 5000, polling: 20 }, is);
    await page.focus('#play');
    await page.keyboard.press(' ');
    await pressed('true');
    await page.waitForFunction((n) => Number(document.getElementById('picture').dataset.routed) > n + 2, { timeout: minutes, polling: 50 }, still);
    await page.keyboard.press(' ');
    await pressed('false');
    await afterwards(() => page.select('#experts', '128'));
    assert.match(await text('experts-read-now'), /of 128/);
    await afterwards(() => page.select('#experts', '64'));
  });

  await t.test('all can be reached by keyboard, is named, and shows that it is reached', async () => {
    await page.focus('.skip');
    const wanted = new Set(await page.$$eval('button, select, input, canvas', (all) => all.filter((e) => !e.matches(':disabled') && e.checkVisibility()).map((e) => e.id)));
    assert.ok(wanted.size >= 10, `${[...wanted]}`);
    // No further than the last of them: behind it come the browser's own buttons.
    for (let i = 0; i < 60 && wanted.size; i++) {
      await page.keyboard.press('Tab');
      const [id, outlined] = await page.evaluate(() => [document.activeElement.id, getComputedStyle(document.activeElement).outlineStyle !== 'none']);
      if (id) assert.ok(outlined, `${id} shows its focus`);
      wanted.delete(id);
    }
    assert.deepEqual([...wanted], []);
    if (firefox) return;
    const tree = await page.accessibility.snapshot();
    const nameless = [];
    const walk = (node) => {
      if (['button', 'slider', 'combobox', 'progressbar', 'application', 'link'].includes(node.role) && !node.name) nameless.push(node.role);
      node.children?.forEach(walk);
    };
    walk(tree);
    assert.deepEqual(nameless, []);
  });

  await t.test('the checks, stopped and begun anew', async () => {
    await page.focus('#check-go');
    await page.keyboard.press(' ');
    await page.waitForFunction(() => document.getElementById('check-go').textContent === 'Stop checking', { timeout: 5000, polling: 20 });
    assert.ok(await page.$eval('#measure-go', (e) => e.disabled), 'nothing is measured meanwhile');
    await page.waitForFunction(() => document.querySelectorAll('#check-rows tbody tr').length === 1, { timeout: 5 * minutes, polling: 50 });
    await page.keyboard.press(' ');
    await checked(page);
    assert.match(await text('check-state'), /^stopped; [12] ok$/);
    const rows = await checkAll(visit);
    t.diagnostic(`${rows.length} checks; ${await text('check-state')}`);
    const names = rows.map((row) => row[0]);
    for (const part of few) assert.ok(names.some((name) => name.includes(part)), part);
    assert.ok(rows.length >= (short ? few.length : 33), `${names}`);
    assert.ok(rows.filter((row) => /as sorting finds it, exactly/.test(row[2])).length >= 4);
  });

  await t.test('the measuring, its file and its page', async () => {
    await page.select('#seconds', '300');
    await page.click('#measure-go');
    assert.ok(await page.$eval('#k', (e) => e.matches(':disabled')), 'nothing else has the device');
    assert.equal(await text('measure-go'), 'Stop measuring');
    const done = () => document.getElementById('measure-go').textContent === 'Measure';
    if (short) {
      await page.waitForFunction(() => document.querySelectorAll('#measure-rows tbody tr').length > 0, { timeout: 5 * minutes, polling: 200 });
      await page.click('#measure-go');
    }
    // A run that was stopped, or one that came to its end.
    await page.waitForFunction(done, { timeout: 10 * minutes, polling: 200 });
    t.diagnostic(await text('measure-state'));
    assert.match(await text('measure-state'), /[1-9]\d* cases measured, 0 failed/);
    for (const clock of await page.$$eval('#measure-rows tbody tr td:nth-child(4)', (all) => all.map((e) => e.textContent))) assert.match(clock, /^(GPU timestamps|page’s clock)$/);
    await page.click('#save-json');
    await page.click('#save-page');
    const report = JSON.parse(await download(downloads, 'wgmoe-bench.json'));
    assert.equal(report.format, 'wgmoe-bench');
    assert.equal(report.os, 'browser');
    assert.match(await download(downloads, 'wgmoe-bench.html'), /Whole layer/);
    if (process.env.RESULTS) writeFileSync(process.env.RESULTS, JSON.stringify(report));
  });

  await t.test('nothing runs out of the page, at any width, in light and dark', async () => {
    for (const scheme of firefox ? ['light'] : ['light', 'dark']) {
      if (!firefox) await page.emulateMediaFeatures([{ name: 'prefers-color-scheme', value: scheme }]);
      for (const width of [1280, 390]) {
        await page.setViewport({ width, height: 900, deviceScaleFactor: width < 500 ? 2 : 1 });
        await new Promise((resolve) => setTimeout(resolve, 400));
        const { scrollWidth, clientWidth } = await page.$eval('html', ({ scrollWidth, clientWidth }) => ({ scrollWidth, clientWidth }));
        assert.ok(scrollWidth <= clientWidth && clientWidth <= width, `${scrollWidth} of ${clientWidth}, ${width} wide`);
        if (!process.env.SHOTS) continue;
        mkdirSync(process.env.SHOTS, { recursive: true });
        await page.screenshot({ path: join(process.env.SHOTS, `${scheme}-${width}.png`), fullPage: true });
      }
    }
  });

  assert.deepEqual(elsewhere, [], 'nothing is asked of another server');
  assert.deepEqual(said, [], 'nothing is wrong in the console');
  if (firefox) return;
  const [worker] = page.workers();

  await t.test('work that the browser refuses is told of, and the twins step in', async () => {
    // The next buffer is asked for with usages that there are not.
    await worker.evaluate(() => {
      const [device] = self.devices;
      device.createBuffer = (wanted) => {
        delete device.createBuffer;
        return device.createBuffer({ ...wanted, usage: 0x10000 });
      };
    });
    await afterwards(() => page.click('#another'));
    assert.match(await text('see-error'), /^Your device did not route this: .*What you see is by the CPU\.$/s);
    assert.equal(await text('twin-now'), 'this is the CPU');
    await afterwards(() => slide('k', 3));
    assert.ok(await page.$eval('#see-error', (e) => e.hidden));
    assert.equal(await text('twin-now'), 'the same');
  });

  await t.test("an error of nobody's work is not blamed on a check; a lost device is told of, and found again", async () => {
    await worker.evaluate(() => { self.devices[0].createBuffer({ size: 16, usage: 0x10000 }); });
    await page.click('#check-go');
    await page.waitForFunction(() => document.querySelectorAll('#check-rows tbody tr').length >= 1, { timeout: 5 * minutes, polling: 50 });
    await worker.evaluate(() => self.devices[0].destroy());
    await checked(page);
    for (const row of await rowsOf(page)) assert.equal(row[1], 'ok', row.join(': '));
    assert.match(await text('device-said'), /reported an error that came of none of the page’s work: /);
    assert.match(await text('check-state'), /^the device was lost; [1-9]\d* ok$/);
    assert.match(await text('device'), /^Your device was lost.*twins on your CPU stand in/);
    assert.ok(await page.$eval('#measure-go', (e) => e.disabled));
    const [before, now] = await afterwards(() => slide('k', 9), () => text('slots-now'));
    assert.notEqual(before, now, 'the picture goes on');
    assert.equal(await text('twin-now'), 'this is the CPU');
    assert.ok(await page.$eval('#see-error', (e) => e.hidden), 'said in one place');
    await page.click('#again');
    await page.waitForFunction(() => document.getElementById('twin-now').textContent === 'the same', { timeout: 3 * minutes, polling: 100 });
    assert.match(await text('device'), /through WebGPU/);
    assert.ok(await page.$eval('#measure-go', (e) => !e.disabled));
    assert.ok(await page.$eval('#again-of', (e) => e.hidden));
  });
});

test('the twins, without WebGPU', { timeout: 20 * minutes }, async (t) => {
  const visit = await open(t, false);
  const { page, text, afterwards, said } = visit;
  t.diagnostic(await text('device'));
  const how = firefox ? 'dom.webgpu.enabled to true' : 'chrome://flags';
  const device = await text('device');
  assert.ok(/^This browser .*, and load the page again\..*twins on your CPU stand in/.test(device) && device.includes(how), device);
  assert.equal(await text('twin-now'), 'this is the CPU');
  const [before, now] = await afterwards(() => page.select('#rule', 'token_choice'));
  assert.notEqual(before, now);
  assert.ok(await page.$eval('#measure-go', (e) => e.disabled));
  const rows = await checkAll(visit);
  assert.ok(rows.length >= 24, `${rows.length} checks`);
  assert.deepEqual(said, []);
});

test('a browser that never answers', { timeout: 5 * minutes }, async (t) => {
  const { page, text } = await open(t, false, { before: neverAnswers });
  assert.match(await text('device'), /^This browser’s WebGPU did not give an adapter within 20 seconds: .*twins on your CPU stand in/);
  assert.equal(await text('twin-now'), 'this is the CPU');
  assert.ok(await page.$eval('#again-of', (e) => !e.hidden));
});
