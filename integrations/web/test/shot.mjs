import { createServer } from 'node:http';
import puppeteer from 'puppeteer-core';
import sirv from 'sirv';
const server = createServer(sirv('dist', { dev: true })).listen(0, '127.0.0.1');
await new Promise((r) => server.once('listening', r));
const url = `http://localhost:${server.address().port}/`;
const browser = await puppeteer.launch({ executablePath: process.env.BROWSER ?? '/usr/bin/chromium', args: ['--no-sandbox', ...(process.env.FLAGS ?? '--enable-unsafe-webgpu').split(' ').filter(Boolean)], protocolTimeout: 600000 });
const page = await browser.newPage();
page.on('console', (m) => console.log('console', m.type(), m.text()));
page.on('workercreated', (w) => { w.on('console', (m) => console.log('worker', m.text())); w.on('error', (m) => console.log('worker error', m)); });
page.on('pageerror', (e) => console.log('pageerror', e.message));
await page.setViewport({ width: 1280, height: 900 });
const t = Date.now();
await page.goto(url);
await page.waitForFunction(() => 'ready' in document.documentElement.dataset || document.querySelector('#device.wrong'), { timeout: 30000 }).catch(async (e) => console.log(e.message, await page.evaluate(() => document.querySelector('#see').innerText)));
console.log('ready', Date.now() - t, await page.evaluate(() => document.documentElement.dataset.firstPicture), await page.$eval('#device', (e) => e.textContent));
console.log(await page.$$eval('.numbers div', (all) => all.map((d) => d.textContent)));
const run = process.argv[2] ?? '';
if (run.includes('c')) {
  const t = Date.now();
  await page.click('#check-go');
  await page.waitForFunction(() => document.querySelector('#check-go').textContent === 'Check', { timeout: 400000 });
  console.log('check', Date.now() - t, await page.$eval('#check-state', (e) => e.textContent));
  console.log((await page.$$eval('#check-rows tbody tr', (all) => all.map((r) => r.innerText))).join('\n'));
}
if (run.includes('m')) {
  const t = Date.now();
  await page.select('#seconds', '30');
  await page.click('#measure-go');
  await page.waitForFunction(() => document.querySelector('#measure-go').textContent === 'Measure', { timeout: 400000, polling: 1000 });
  console.log('measure', Date.now() - t, await page.$eval('#measure-state', (e) => e.textContent));
  console.log((await page.$$eval('#measure-rows tbody tr', (all) => all.map((r) => r.innerText))).join('\n'));
  console.log(await page.$eval('#measure-notes', (e) => e.textContent));
}
for (const scheme of ['light', 'dark']) for (const width of [1280, 390]) {
  await page.emulateMediaFeatures([{ name: 'prefers-color-scheme', value: scheme }]);
  await page.setViewport({ width, height: 900, deviceScaleFactor: width < 500 ? 2 : 1 });
  await new Promise((r) => setTimeout(r, 600));
  await page.screenshot({ path: `/tmp/shots/${scheme}-${width}.png`, fullPage: true });
  console.log(width, await page.evaluate(() => document.documentElement.scrollWidth));
}
await browser.close(); server.close();
