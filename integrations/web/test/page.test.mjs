// Opens the page in a headless Chromium and uses it as a visitor does: real clicks, keys and a dragged slider.
//
//   npm ci --ignore-scripts && node --test page.test.mjs
//
// FOLDER: where the page was built (../dist). BROWSER: a Chromium; else the first of the usual names on the PATH.
// SHOTS: a folder for pictures of the page at two widths, light and dark. SHORT=1 makes fewer checks, and measures briefly.
import assert from 'node:assert/strict';
import { accessSync, constants, mkdirSync, mkdtempSync, readFileSync, readdirSync, rmSync } from 'node:fs';
import { createServer } from 'node:http';
import { tmpdir } from 'node:os';
import { delimiter, dirname, join } from 'node:path';
import { after, before, test } from 'node:test';
import { fileURLToPath } from 'node:url';
import puppeteer from 'puppeteer-core';
import sirv from 'sirv';

const folder = process.env.FOLDER ?? join(dirname(fileURLToPath(import.meta.url)), '../dist');
const short = process.env.SHORT === '1';
const minutes = 60_000;

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
before(async () => {
  server = createServer(sirv(folder, { dev: true }));
  await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve));
  url = `http://localhost:${server.address().port}/`;
});
after(() => server.close());

/// A page that is ready, and what its console and its network had to say.
async function open(t, flags) {
  const downloads = mkdtempSync(join(tmpdir(), 'wgmoe-web.'));
  const browser = await puppeteer.launch({ executablePath: browserPath(), args: ['--no-sandbox', ...flags], protocolTimeout: 10 * minutes });
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
  const session = await browser.target().createCDPSession();
  await session.send('Browser.setDownloadBehavior', { behavior: 'allow', downloadPath: downloads });
  await page.setViewport({ width: 1280, height: 900 });
  await page.goto(url);
  await page.waitForFunction(() => 'ready' in document.documentElement.dataset || document.querySelector('#device.wrong'), { timeout: 3 * minutes, polling: 100 });
  const text = (id) => page.$eval(`#${id}`, (e) => e.textContent);
  const routed = () => page.$eval('#picture', (e) => Number(e.dataset.routed));
  /// What an act changes, once the block has been routed anew.
  const afterwards = async (act, read = () => text('experts-read')) => {
    const [before, count] = [await read(), await routed()];
    await act();
    await page.waitForFunction((n) => {
      const { dataset, ariaBusy } = document.getElementById('picture');
      return Number(dataset.routed) > n && ariaBusy === 'false';
    }, { timeout: 2 * minutes, polling: 50 }, count);
    return [before, await read()];
  };
  return { page, said, elsewhere, downloads, text, afterwards };
}

async function checkAll({ page, text }, most) {
  await page.click('#check-go');
  if (most) {
    await page.waitForFunction((n) => document.querySelectorAll('#check-rows tbody tr').length >= n, { timeout: 10 * minutes, polling: 100 }, most);
    await page.click('#check-go');
  }
  await page.waitForFunction(() => document.getElementById('check-go').textContent === 'Check', { timeout: 10 * minutes, polling: 100 });
  const rows = await page.$$eval('#check-rows tbody tr', (all) => all.map((row) => [...row.children].map((cell) => cell.textContent)));
  for (const row of rows) assert.equal(row[1], 'ok', row.join(': '));
  return [rows, await text('check-state')];
}

async function download(folder, name) {
  for (let i = 0; i < 100; i++) {
    if (readdirSync(folder).includes(name)) return readFileSync(join(folder, name), 'utf8');
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
  throw new Error(`${name} was not saved; there are ${readdirSync(folder)}`);
}

test('the kernels, on a device', { timeout: 20 * minutes }, async (t) => {
  const visit = await open(t, ['--enable-unsafe-webgpu']);
  const { page, said, elsewhere, downloads, text, afterwards } = visit;
  t.diagnostic(`${await text('device')} First picture after ${await page.evaluate(() => document.documentElement.dataset.firstPicture)} ms, the device's own after ${await page.evaluate(() => document.documentElement.dataset.ready)} ms.`);
  assert.match(await text('device'), /through WebGPU/);
  assert.match(await text('limits'), /Largest binding/);

  await t.test('a slider that is dragged moves the picture and its numbers', async () => {
    const slider = await (await page.$('#k')).boundingBox();
    const middle = slider.y + slider.height / 2;
    const at = (share) => slider.x + slider.width * share;
    const share = await page.$eval('#k', (e) => (e.value - e.min) / (e.max - e.min));
    const pixels = () => page.$eval('#picture', (e) => e.toDataURL());
    const [before, slots] = [await pixels(), await text('slots')];
    await afterwards(async () => {
      await page.mouse.move(at(share), middle);
      await page.mouse.down();
      await page.mouse.move(at(0.9), middle, { steps: 5 });
      await page.mouse.up();
    });
    await page.waitForFunction((slots) => document.getElementById('slots').textContent !== slots, { timeout: minutes }, slots);
    assert.ok(Number(await page.$eval('#k', (e) => e.value)) > 10);
    await new Promise((resolve) => setTimeout(resolve, 500));
    assert.notEqual(await pixels(), before);
    assert.equal(await text('twin'), 'the same');
  });

  await t.test('every rule routes as the twin does, and only its own numbers can be moved', async () => {
    const rules = await page.$$eval('#rule option', (all) => all.map((o) => o.value));
    assert.equal(rules.length, 8);
    await afterwards(async () => {
      await page.focus('#k');
      await page.keyboard.press('Home');
      await page.keyboard.press('ArrowRight');
    });
    assert.equal(await page.$eval('#k', (e) => e.value), '2');
    const some = ['mass', 'expert_choice', 'masked_union'];
    for (const rule of short ? some : rules) {
      if ((await page.$eval('#rule', (e) => e.value)) !== rule) await afterwards(() => page.select('#rule', rule));
      assert.equal(await text('twin'), 'the same', rule);
      assert.match(await text('rule-words'), /\(.+\)$/, rule);
      const elects = ['mass', 'capacity', 'vote', 'union', 'masked_union'].includes(rule);
      assert.equal(/of 64/.test(await text('elected')), elects, rule);
      const free = await page.$$eval('.sliders input:enabled', (all) => all.map((e) => e.id));
      assert.ok(free.includes('k') && free.length < 4, `${rule}: ${free}`);
    }
    const [all, none] = await afterwards(async () => {
      await page.focus('#mask');
      await page.keyboard.press('Home');
    });
    assert.notEqual(all, none, 'fewer voters, another coreset');
    await page.focus('#picture');
    await page.keyboard.press('ArrowRight');
    await page.keyboard.press('ArrowRight');
    assert.match(await text('cell'), /^Token 1, expert 2: score \d\.\d\d/);
    await afterwards(() => page.click('#another'), () => text('cell'));
    const count = () => page.$eval('#picture', (e) => Number(e.dataset.routed));
    const still = await count();
    await page.click('#play');
    assert.equal(await text('play'), 'Stop');
    await page.waitForFunction((n) => Number(document.getElementById('picture').dataset.routed) > n + 2, { timeout: minutes, polling: 50 }, still);
    await page.click('#play');
    assert.equal(await text('play'), 'Play');
    await afterwards(() => page.select('#experts', '128'));
    assert.match(await text('experts-read'), /of 128/);
  });

  await t.test('the checks', async () => {
    const [rows, state] = await checkAll(visit, short && 17);
    t.diagnostic(`${rows.length} checks; ${state}`);
    if (!short) assert.match(state, /^all \d+ ok$/);
  });

  await t.test('the measuring, its file and its page', async () => {
    await page.select('#seconds', '300');
    await page.click('#measure-go');
    assert.ok(await page.$eval('#k', (e) => e.matches(':disabled')), 'nothing else has the device');
    const done = () => document.getElementById('measure-go').textContent === 'Measure';
    if (short) {
      await page.waitForFunction(() => document.querySelectorAll('#measure-rows tbody tr').length > 0, { timeout: 5 * minutes, polling: 200 });
      await page.click('#measure-go');
    }
    // A run that was stopped, or one that came to its end.
    await page.waitForFunction(done, { timeout: 10 * minutes, polling: 200 });
    t.diagnostic(await text('measure-state'));
    assert.match(await text('measure-state'), /[1-9]\d* cases measured, 0 failed/);
    await page.click('#save-json');
    await page.click('#save-page');
    const report = JSON.parse(await download(downloads, 'wgmoe-bench.json'));
    assert.equal(report.format, 'wgmoe-bench');
    assert.equal(report.os, 'browser');
    assert.match(await download(downloads, 'wgmoe-bench.html'), /Whole layer/);
    if (process.env.RESULTS) {
      const { writeFileSync } = await import('node:fs');
      writeFileSync(process.env.RESULTS, JSON.stringify(report));
    }
  });

  await t.test('nothing runs out of the page, at any width, in light and dark', async () => {
    for (const scheme of ['light', 'dark']) {
      await page.emulateMediaFeatures([{ name: 'prefers-color-scheme', value: scheme }]);
      for (const width of [1280, 390]) {
        await page.setViewport({ width, height: 900, deviceScaleFactor: width < 500 ? 2 : 1 });
        await new Promise((resolve) => setTimeout(resolve, 400));
        assert.equal(await page.evaluate(() => document.documentElement.scrollWidth), width);
        if (!process.env.SHOTS) continue;
        mkdirSync(process.env.SHOTS, { recursive: true });
        await page.screenshot({ path: join(process.env.SHOTS, `${scheme}-${width}.png`), fullPage: true });
      }
    }
  });

  assert.deepEqual(elsewhere, [], 'nothing is asked of another server');
  assert.deepEqual(said, [], 'nothing is wrong in the console');
});

test('the twins, without WebGPU', { timeout: 20 * minutes }, async (t) => {
  const visit = await open(t, ['--disable-features=WebGPUService', '--disable-gpu']);
  const { page, text, afterwards, said } = visit;
  t.diagnostic(await text('device'));
  assert.match(await text('device'), /^This browser .*chrome:\/\/flags, and load the page again\..*twins on your CPU stand in/);
  assert.equal(await text('twin'), 'this is the CPU');
  const [before, now] = await afterwards(() => page.select('#rule', 'token_choice'));
  assert.notEqual(before, now);
  assert.ok(await page.$eval('#measure-go', (e) => e.disabled));
  const [rows, state] = await checkAll(visit);
  assert.match(state, /^all \d+ ok$/);
  assert.ok(rows.length >= 20, `${rows.length} checks`);
  assert.deepEqual(said, []);
});
