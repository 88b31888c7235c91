'use strict';
const data = JSON.parse(document.getElementById('data').textContent);
const groups = data.groups, form = document.querySelector('form'), list = document.getElementById('list');
const BATCH = 15;
let shown = [], drawn = 0, current = -1;

// Model text is only ever set as textContent: it cannot become markup.
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === 'style') Object.assign(made.style, value);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value);
  }
  made.append(...children.filter(child => child !== null));
  return made;
}
function svg(tag, attributes) {
  const made = document.createElementNS('http://www.w3.org/2000/svg', tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}
const number = value => value === null || value === undefined ? ''
  : Number.isInteger(value) ? String(value) : String(+value.toPrecision(3));
const key = group => group.key;

// --- what is shown, in which order

const byStep = (a, b) => (a.step ?? 0) - (b.step ?? 0) || a.place - b.place;
const ORDERS = {
  step: byStep,
  newest: (a, b) => byStep(b, a),
  worst: (a, b) => a.mean - b.mean || byStep(a, b),
  best: (a, b) => b.mean - a.mean || byStep(a, b),
  spread: (a, b) => b.spread - a.spread || byStep(a, b),
  longest: (a, b) => b.longest - a.longest || byStep(a, b),
  record: (a, b) => a.id < b.id ? -1 : a.id > b.id ? 1 : byStep(a, b),
};
function fits(group, wanted) {
  return (!wanted.task || group.task === wanted.task)
    && (!wanted.run || group.run === wanted.run)
    && (!wanted.id || group.id === wanted.id)
    && (wanted.from === '' || group.step >= +wanted.from)
    && (wanted.to === '' || group.step <= +wanted.to)
    && (wanted.low === '' || group.mean >= +wanted.low)
    && (wanted.high === '' || group.mean <= +wanted.high)
    && (wanted.kind !== 'cut' || group.rows.some(row => row.finished === false))
    && (wanted.kind !== 'silent' || (group.count > 1 && group.spread === 0))
    && (wanted.kind !== 'mixed' || group.spread > 0)
    && (!wanted.text || searchable(group).includes(wanted.text.toLowerCase()));
}
function searchable(group) {  // made when it is first searched: most pages never are
  group.search ??= [group.id, group.prompt, group.target, ...group.rows.map(row => row.text)]
    .join('\n').toLowerCase();
  return group.search;
}
function wanted() {
  const values = {};
  for (const name of ['task', 'run', 'id', 'from', 'to', 'low', 'high', 'kind', 'text', 'sort']) {
    values[name] = form.elements[name]?.value ?? '';
  }
  return values;
}
function update(at = null) {
  const values = wanted();
  shown = groups.filter(group => fits(group, values)).sort(ORDERS[values.sort] ?? byStep);
  drawn = 0; current = -1;
  list.replaceChildren();
  const count = shown.reduce((sum, group) => sum + group.count, 0);
  document.querySelector('output').textContent =
    `${shown.length} of ${groups.length} prompts, ${count} completions`;
  more();
  remember(at);
  if (at !== null) go(shown.findIndex(group => key(group) === at));
}
function more(until = drawn + BATCH) {
  for (const end = Math.min(until, shown.length); drawn < end; drawn++) {
    list.append(card(shown[drawn], drawn));
  }
}
function go(index) {
  if (index < 0 || index >= shown.length) return;
  more(Math.max(drawn, index + 3));
  current = index;
  const target = list.children[index];
  target.focus({ preventScroll: true });
  target.scrollIntoView({ block: 'start' });
  remember(key(shown[index]));
}

// --- the address says what is shown: #id@step, or #sort=worst&task=...&at=id@step

function remember(at) {
  const values = wanted(), parts = new URLSearchParams();
  for (const [name, value] of Object.entries(values)) {
    if (value && !(name === 'sort' && value === 'step')) parts.set(name, value);
  }
  if (at !== null) parts.set('at', at);
  const only = at !== null && [...parts.keys()].length === 1;
  history.replaceState(null, '', '#' + (only ? encodeURIComponent(at) : parts.toString()));
}
function recall() {
  const text = location.hash.slice(1);
  let at = null;
  if (text && !text.includes('=')) at = decodeURIComponent(text);
  const parts = new URLSearchParams(text.includes('=') ? text : '');
  for (const [name, value] of parts) {
    if (name === 'at') at = value;
    else if (form.elements[name]) form.elements[name].value = value;
  }
  update(at);
}

// --- one prompt

function card(group, index) {
  const made = element('article', { tabindex: -1, 'data-key': key(group), 'data-index': index });
  const spread = group.count > 1 ? ` ± ${number(group.spread)}` : '';
  const head = element('h2', {},
    group.run ? element('span', { class: 'run', style: { color: data.runs[group.run] } }, group.run) : null,
    element('a', { href: '#' + encodeURIComponent(key(group)) }, group.id),
    element('small', {}, [group.step === null ? null : `step ${group.step}`, group.task,
      `${data.metric} ${number(group.mean)}${spread}`].filter(Boolean).join(', ')));
  if (group.step !== null && data.repeated.includes(group.id) && !wanted().id) {
    const over = element('button', { type: 'button' }, 'over steps');
    over.addEventListener('click', () => {
      form.elements.id.value = group.id; form.elements.sort.value = 'step'; update();
    });
    head.append(over);
  }
  if (group.count > 1 && group.spread === 0) {
    head.append(element('small', { class: 'bad' }, 'no gradient: all rewards are equal'));
  }
  made.append(head, long(group.prompt), element('pre', { class: 'target' }, `target: ${group.target}`));
  const picture = group.clip === null ? null : data.clips[group.clip];
  if (picture) made.append(...strip(group, picture));
  else if (group.annotated.length && group.duration) made.append(...bars(group));
  if (group.note) made.append(element('p', { class: 'soft' }, group.note));
  if (group.video) made.append(player(group));
  made.append(table(group));
  for (const name of ['pointerover', 'focusin']) made.addEventListener(name, event => mark(made, event));
  made.addEventListener('pointerleave', () => mark(made, null));
  return made;
}
function long(text) {
  if (text.length < 700) return element('pre', {}, text);
  return element('details', {}, element('summary', {}, `${text.slice(0, 160)} …`), element('pre', {}, text));
}
function mark(made, event) {  // the row, bar and boxes of one completion
  const found = event?.target.closest('[data-i]')?.dataset.i;
  made.classList.toggle('dim', found !== undefined && found !== 'annotated');
  for (const one of made.querySelectorAll('[data-i]')) one.classList.toggle('hot', one.dataset.i === found);
}
const colour = index => data.colours[index % data.colours.length];

function strip(group, picture) {
  // Each frame begins at its second of the axis below, whatever the width of the page.
  const count = picture.frames.length, width = 100 / Math.max(count, 1), length = group.duration;
  const place = (seconds, i) => length ? Math.min(100 * seconds / length, 100 - width) : i * width;
  const box = element('div', { class: 'strip', style: { aspectRatio: `${count * picture.ratio} / 1` } });
  if (!length) box.style.maxWidth = '26rem';
  picture.frames.forEach((source, i) => {
    const seconds = picture.times[i], said = length ? `frame at ${number(seconds)} s` : 'the image';
    const figure = element('figure', { style: {
      left: `${place(seconds, i)}%`, width: `calc(${width}% - 3px)`, height: '100%' } });
    figure.append(element('img', { src: source, alt: said, loading: 'lazy' }));
    const over = svg('svg', { viewBox: '0 0 1 1', preserveAspectRatio: 'none' });
    const draw = (where, name, paint) => {
      if (!where) return;
      const [x0, y0, x1, y1] = where.map(value => Math.min(Math.max(value, 0), 1));
      const size = { x: x0, y: y0, width: Math.max(x1 - x0, 0), height: Math.max(y1 - y0, 0), 'data-i': name };
      over.append(svg('rect', { ...size, class: 'under' }));
      over.append(svg('rect', { ...size, ...(paint ? { stroke: paint } : { class: 'annotated' }) }));
    };
    group.rows.forEach((row, j) => draw(row.boxes?.[i], j, colour(j)));
    draw(group.boxes?.[i], 'annotated', null);
    figure.append(over);
    box.append(figure);
  });
  if (!length) return [box];
  const axis = element('div', { class: 'axis', 'aria-hidden': 'true' });
  picture.times.forEach((seconds, i) => {
    axis.append(element('i', { style: { left: `${100 * seconds / length}%` } }),
      element('span', { style: { left: `calc(${place(seconds, i)}% + 2px)` } }, `${number(seconds)} s`));
  });
  axis.append(element('i', { style: { left: '100%' } }));
  return [box, axis, ...bars(group)];
}
function bars(group) {
  if (!group.annotated.length) return [];
  const bar = (label, spans, name, paint) => {
    const made = element('div', { class: name === 'annotated' ? 'bar annotated' : 'bar', 'data-i': name });
    for (const [start, end] of spans) {
      const [left, right] = [start, end].map(v => 100 * Math.min(Math.max(v / group.duration, 0), 1));
      made.append(element('i', { title: `${number(start)} to ${number(end)} s`,
        style: { left: `${left}%`, width: `${Math.max(right - left, 0)}%`, background: paint } }));
    }
    made.append(element('b', {}, label));
    return made;
  };
  return [bar('annotated', group.annotated, 'annotated', null),
    ...group.rows.map((row, j) => row.spans ? bar(label(row, j), row.spans, j, colour(j)) : null),
    ...(group.aims ?? []).map(aim => bar(aim.label, aim.spans, 'aim', 'gray'))].filter(Boolean);
}
const label = (row, j) => row.times > 1 ? `${j + 1} (x${row.times})` : `${j + 1}`;

function player(group) {
  const [start, end] = group.annotated[0] ?? [0, group.duration];
  const named = group.annotated.length ? `play ${number(start)} to ${number(end)} s` : 'play';
  const button = element('button', { type: 'button' }, named);
  button.addEventListener('click', () => {
    const [from, to] = [start, end].map(value => (value ?? 0) + group.start);
    const source = `${group.video}#t=${from},${to}`;
    const video = element('video', { src: source, controls: '', muted: '', autoplay: '' });
    video.addEventListener('error', () => video.replaceWith(`cannot be played here: ${group.video}`));
    button.replaceWith(video);
  });
  return button;
}
function table(group) {
  const names = [...new Set(group.rows.flatMap(row => Object.keys(row.rewards)))];
  const several = names.length > 1, has = field => group.rows.some(row => row[field] !== undefined);
  const heads = ['', ...(several && data.total ? ['total'] : []), ...names,
    ...(has('advantage') ? ['advantage'] : []), ...(has('tokens') ? ['tokens'] : [])];
  const body = element('tbody');
  group.rows.forEach((row, j) => {
    const line = element('tr', { 'data-i': j });
    line.append(element('td', { class: 'n' },
      element('span', { class: 'swatch', style: { background: colour(j) } }), label(row, j)));
    const cell = (name, value, kind = '') => line.append(
      element('td', { class: `n ${kind}`, 'data-name': name }, number(value)));
    const shade = value => value > 0 ? 'good' : 'bad';
    if (several && data.total) cell('total', row.reward, `total ${shade(row.reward)}`);
    for (const name of names) {
      const value = row.rewards[name];
      cell(name, value, typeof value === 'number' ? shade(value) : '');
    }
    if (has('advantage')) cell('advantage', row.advantage);
    if (has('tokens')) cell('tokens', row.tokens);
    const text = element('td', { class: 'text' });
    if (row.finished === false) text.append(element('span', { class: 'bad' }, 'cut off '));
    const thought = /^([^]*?)<think>([^]*?)<\/think>([^]*)$/.exec(row.text);
    if (thought) {
      const words = thought[2].trim().split(/\s+/).length;
      text.append(element('details', {}, element('summary', {}, `thinking, ${words} words`),
        element('pre', {}, thought[2])), element('pre', {}, (thought[1] + thought[3]).trim()));
    } else text.append(long(row.text));
    line.append(text);
    body.append(line);
  });
  const titles = element('tr', {}, ...heads.map(name => element('th', { class: 'n', scope: 'col' }, name)),
    element('th', { scope: 'col' }, 'completion'));
  return element('table', { class: 'rows' }, element('thead', {}, titles), body);
}

// --- the head of the page

function curve([name, lines]) {
  const all = Object.values(lines).flat(), steps = all.map(p => p[0]), values = all.map(p => p[1]);
  const [x0, x1, y0, y1] = [Math.min(...steps), Math.max(...steps), Math.min(...values), Math.max(...values)];
  const picture = svg('svg', { viewBox: '0 0 100 100', preserveAspectRatio: 'none', role: 'img' });
  picture.setAttribute('aria-label', `${name} from ${number(values[0])} to ${number(values.at(-1))}`);
  for (const [run, points] of Object.entries(lines)) {
    const path = points.map(([x, y]) => `${100 * (x - x0) / (x1 - x0 || 1)},${100 - 100 * (y - y0) / (y1 - y0 || 1)}`);
    picture.append(svg('polyline', { points: path.join(' '), stroke: data.runs[run] ?? 'currentColor' }));
  }
  const last = Object.values(lines).map(points => number(points.at(-1)[1])).join(' | ');
  return element('figure', {}, element('figcaption', {}, `${name} `, element('b', {}, last)), picture);
}
function header() {
  document.getElementById('curves').append(...Object.entries(data.curves).map(curve));
  const body = document.querySelector('.settings tbody');
  for (const [name, values] of data.settings) {
    body.append(element('tr', {}, element('td', {}, name), ...values.map(value => element('td', {}, value))));
  }
  document.getElementById('settings').hidden = !data.settings.length;
  const option = value => element('option', { value }, value);
  form.elements.task.append(...[...new Set(groups.map(group => group.task))].sort().map(option));
  form.elements.run.append(...Object.keys(data.runs).map(option));
  form.elements.run.parentElement.hidden = Object.keys(data.runs).length < 2;
  const stepped = groups.some(group => group.step !== null);
  for (const name of ['from', 'to']) form.elements[name].parentElement.hidden = !stepped;
}

groups.forEach((group, place) => { group.place = place; });
header();
let pending = 0;
form.addEventListener('input', () => { clearTimeout(pending); pending = setTimeout(update, 120); });
form.addEventListener('submit', event => event.preventDefault());
form.addEventListener('reset', () => setTimeout(update));
addEventListener('hashchange', recall);
new IntersectionObserver(entries => { if (entries.some(entry => entry.isIntersecting)) more(); },
  { rootMargin: '1500px' }).observe(document.getElementById('end'));
addEventListener('keydown', event => {
  const typing = event.target.closest('input, select, textarea');
  if (event.key === 'Escape' && typing) typing.blur();
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === 'j') go(current + 1);
  else if (event.key === 'k') go(Math.max(current - 1, 0));
  else if (event.key === '/') { event.preventDefault(); form.elements.text.focus(); }
});
recall();
if (data.watch) {  // the file is written again while the run goes on
  const place = sessionStorage.getItem('place');
  if (place !== null) { more(+place.split(' ')[0]); scrollTo(0, +place.split(' ')[1]); }
  setInterval(() => {
    sessionStorage.setItem('place', `${drawn} ${scrollY}`);
    location.reload();
  }, 1000 * data.watch);
}
