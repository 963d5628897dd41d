// Script of report.html: the list of every item, the charts, and printing. Texts of data are only ever set as
// textContent. The page works without it, except for the list.
"use strict";

const PAGE = 25; // items on a page of the list
const ANY = "";

const data = JSON.parse(document.getElementById("data").textContent);
const items = data.items;
const text = (number) => data.strings[number];

// ---- Elements ----

/** Creates an element with properties, data attributes excluded, and children, which are elements or texts. */
function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

/** The answer of a model with its mark; screen readers are told the word. */
function answerNodes(answer) {
  if (!answer) return [element("span", { className: "hidden" }, "not asked"), "–"];
  const sign = answer.correct ? "✓" : "✗";
  const words = answer.correct ? "correct" : "wrong";
  const mark = element("span", { className: answer.correct ? "right" : "wrong" });
  mark.append(element("span", { ariaHidden: "true" }, sign), element("span", { className: "hidden" }, words));
  return answer.text === null ? [mark] : [mark, " ", element("span", { dir: "auto" }, answer.text)];
}

function row(tag, ...cells) {
  const line = element("tr");
  for (const cell of cells) {
    line.append(cell instanceof HTMLTableCellElement ? cell : element(tag, {}, ...[cell].flat()));
  }
  return line;
}

// ---- Answers ----

/** A model's answer to the item at a position: as asked, or under an attempt of an attack; null if it has none. */
function answerAt(answers, model, position) {
  const given = answers[model];
  if (!given || given.correct[position] === "-") return null;
  const number = given.text[position];
  return { correct: given.correct[position] === "1", text: number < 0 ? null : text(number) };
}

/** Everything that the search looks through, in lower case, by item; made at the first search. */
let haystacks = null;
function haystack(item) {
  haystacks ??= items.question.map((question, i) =>
    [question, items.answer[i], items.person[i], items.id[i], ...data.models.map((m) => data.answers[m.name].text[i])]
      .map((number) => (number < 0 ? "" : text(number)))
      .join("\n")
      .toLowerCase(),
  );
  return haystacks[item];
}

// ---- The list ----

const explorer = document.getElementById("explorer");
const form = explorer.querySelector("form");
const dialog = document.getElementById("item");
let matches = []; // positions in `source().items` that match the filter
let page = 0;
let opened = -1; // index in `matches` of the item in the dialog

const everything = { items: items.question.map((_, i) => i), answers: data.answers };

/** The answers that are shown: those as asked, or those under the chosen attempt. */
function source() {
  const chosen = form.elements.attempt.value;
  return chosen === ANY ? everything : data.attempts[Number(chosen)];
}

/** Fills a select with "any" and choices, [value, title] each. */
function fill(select, any, choices) {
  select.replaceChildren(new Option(any, ANY), ...choices.map(([value, title]) => new Option(title, value)));
}

function buildForm() {
  const attempt = form.elements.attempt;
  fill(attempt, "as asked", []);
  const groups = new Map();
  data.attempts.forEach((tried, number) => {
    if (!groups.has(tried.attack)) groups.set(tried.attack, element("optgroup", { label: tried.attack }));
    groups.get(tried.attack).append(new Option(tried.title, number));
  });
  attempt.append(...groups.values());
  attempt.disabled = !data.attempts.length;
  fill(form.elements.set, "any", data.sets.map((set, number) => [number, set.title]));
  fill(form.elements.role, "any", [...new Set(data.sets.map((set) => set.role))].map((role) => [role, role]));
  fill(form.elements.kind, "any", data.kinds.map((kind, number) => [number, kind.title]));
  for (const model of data.models) {
    const name = `verdict-${model.name}`;
    const select = element("select", { name, id: name });
    fill(select, "right or wrong", [["1", "right"], ["0", "wrong"]]);
    form.querySelector(".verdicts").append(element("div", {}, element("label", { htmlFor: name }, model.title), select));
  }
  const heads = ["question", "right answer", ...data.models.map((model) => model.title)];
  explorer.querySelector("thead").append(row("th", ...heads.map((title) => element("th", { scope: "col" }, title))));
}

/** Finds the items that match the form, and shows their first page. */
function filter() {
  const { items: numbers, answers } = source();
  const chosen = (name) => form.elements[name].value;
  const words = chosen("search").toLowerCase().split(/\s+/).filter(Boolean);
  const [set, role, kind] = ["set", "role", "kind"].map(chosen);
  const verdicts = data.models.map((model) => [model.name, chosen(`verdict-${model.name}`)]).filter(([, v]) => v);
  matches = [];
  numbers.forEach((item, position) => {
    const fits =
      (set === ANY || items.set[item] === Number(set)) &&
      (role === ANY || data.sets[items.set[item]].role === role) &&
      (kind === ANY || items.kind[item] === Number(kind)) &&
      verdicts.every(([model, wanted]) => answers[model]?.correct[position] === wanted) &&
      words.every((word) => haystack(item).includes(word));
    if (fits) matches.push(position);
  });
  page = 0;
  show();
}

const count = (number) => number.toLocaleString("en-US");

function show() {
  const { items: numbers, answers } = source();
  const pages = Math.max(1, Math.ceil(matches.length / PAGE));
  const body = explorer.querySelector("tbody");
  body.replaceChildren(
    ...matches.slice(page * PAGE, (page + 1) * PAGE).map((position, i) => {
      const item = numbers[position];
      const cells = data.models.map((model) => {
        const cell = element("td", {}, ...answerNodes(answerAt(answers, model.name, position)));
        cell.dataset.label = model.title;
        return cell;
      });
      const truth = element("td", { dir: "auto" }, text(items.answer[item]));
      truth.dataset.label = "right answer";
      return row("td", element("th", { scope: "row" }, askButton(item, page * PAGE + i)), truth, ...cells);
    }),
  );
  const right = data.models.map((model) => {
    const asked = matches.filter((position) => "01".includes(answers[model.name]?.correct[position] ?? "-"));
    const correct = asked.filter((position) => answers[model.name].correct[position] === "1");
    return `${model.title} ${count(correct.length)} of ${count(asked.length)}`;
  });
  const total = `${count(matches.length)} of ${count(numbers.length)} questions match.`;
  explorer.querySelector(".status").textContent = matches.length ? `${total} Right: ${right.join(", ")}.` : total;
  const [previous, next] = explorer.querySelectorAll(".pager button");
  previous.disabled = page === 0;
  next.disabled = page >= pages - 1;
  explorer.querySelector(".pager span").textContent = `Page ${count(page + 1)} of ${count(pages)}`;
}

/** What the item is about: set, kind and person. */
function about(item) {
  const person = text(items.person[item]);
  const place = [data.sets[items.set[item]].title, data.kinds[items.kind[item]].title.toLowerCase()];
  return (person ? [...place, `person ${person}`] : place).join(" · ");
}

function askButton(item, index) {
  const button = element("button", { type: "button", className: "ask" });
  if (items.image[item] >= 0) {
    button.append(element("img", { className: "thumb", alt: "", src: data.images[items.image[item]] }));
  }
  const question = element("span", { className: "text", dir: "auto" }, text(items.question[item]));
  button.append(element("span", {}, question, element("span", { className: "about" }, about(item))));
  button.addEventListener("click", () => open(index));
  return button;
}

function turn(pages) {
  page += pages;
  show();
  explorer.querySelector(".table").scrollIntoView({ block: "nearest" });
}

// ---- One item ----

function open(index) {
  opened = index;
  const item = source().items[matches[index]];
  dialog.querySelector(".place").textContent = `${about(item)} · ${text(items.id[item])}`;
  dialog.querySelector("h3").textContent = text(items.question[item]);
  dialog.querySelector(".picture").replaceChildren(...picture(item));
  dialog.querySelector(".options").replaceChildren(...options(item));
  dialog.querySelector(".answers").replaceChildren(...given(item), ...underAttack(item));
  const [previous, next] = dialog.querySelectorAll("footer button");
  previous.disabled = index === 0;
  next.disabled = index === matches.length - 1;
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
}

function step(by) {
  if (matches[opened + by] === undefined) return;
  open(opened + by);
  const target = Math.floor(opened / PAGE);
  if (target !== page) turn(target - page);
}

function picture(item) {
  if (items.image[item] >= 0) {
    return [element("img", { src: data.images[items.image[item]], alt: `Image of the question, item ${text(items.id[item])}` })];
  }
  return items.pictured[item] === "1" ? [element("p", {}, "The image of this question is not embedded in this file.")] : [];
}

function options(item) {
  if (!items.options[item].length) {
    return [element("p", {}, "Right answer: ", element("strong", { dir: "auto" }, text(items.answer[item])))];
  }
  const list = element("ol", { type: "A" });
  for (const option of items.options[item]) {
    const line = element("li", {}, element("span", { dir: "auto" }, text(option)));
    if (option === items.answer[item]) line.append(element("strong", {}, " (right answer)"));
    list.append(line);
  }
  const known = items.options[item].includes(items.answer[item]);
  return known ? [list] : [list, element("p", {}, `Right answer: ${text(items.answer[item])}`)];
}

function given(item) {
  const table = element("table");
  const measured = data.models.some((model) => data.answers[model.name].probability[item] !== null);
  const heads = ["model", "answer", ...(measured ? ["probability of the right answer, per token"] : [])];
  table.append(element("thead", {}, row("th", ...heads.map((title) => element("th", { scope: "col" }, title)))));
  const body = element("tbody");
  for (const model of data.models) {
    const name = element("th", { scope: "row" }, model.title, " ", element("small", {}, model.note));
    const probability = data.answers[model.name].probability[item];
    const cells = [name, answerNodes(answerAt(data.answers, model.name, item))];
    body.append(row("td", ...cells, ...(measured ? [probability === null ? "–" : probability.toFixed(3)] : [])));
  }
  table.append(body);
  return [element("h4", {}, "Answers"), scrolling(table)];
}

function underAttack(item) {
  const tried = data.attempts.filter((attempt) => attempt.items.includes(item));
  if (!tried.length) return [];
  const table = element("table");
  const heads = ["attempt", ...data.models.map((model) => model.title)];
  table.append(element("thead", {}, row("th", ...heads.map((title) => element("th", { scope: "col" }, title)))));
  const body = element("tbody");
  for (const attempt of tried) {
    const position = attempt.items.indexOf(item);
    const name = element("th", { scope: "row" }, `${attempt.attack.split(":")[0]}: ${attempt.title}`);
    body.append(row("td", name, ...data.models.map((model) => answerNodes(answerAt(attempt.answers, model.name, position)))));
  }
  table.append(body);
  return [element("h4", {}, "Answers under attack"), scrolling(table)];
}

const scrolling = (table) =>
  element("div", { className: "table", role: "group", ariaLabel: "Table, scrolls sideways", tabIndex: 0 }, table);

// ---- Charts ----

/** Moves the cursor of a chart to a stop, and shows the figures there, which are those of its table. */
function moveCursor(chart, stop) {
  const stops = chart.dataset.stops.split(" ");
  const svg = chart.querySelector("svg[role=slider]");
  const number = Math.min(Math.max(stop, 0), stops.length - 1);
  const cells = [...chart.querySelectorAll("tbody tr")[number].children].map((cell) => cell.textContent);
  const titles = [...chart.querySelectorAll("thead th")].map((cell) => cell.textContent);
  chart.querySelectorAll("output").forEach((output, i) => (output.textContent = cells[i]));
  svg.setAttribute("aria-valuenow", number + 1);
  svg.setAttribute("aria-valuetext", titles.map((title, i) => `${title} ${cells[i]}`).join(", "));
  const cursor = svg.querySelector(".cursor");
  for (const end of ["x1", "x2"]) cursor.setAttribute(end, stops[number]);
  cursor.setAttribute("visibility", "visible");
}

function bindChart(chart) {
  const svg = chart.querySelector("svg[role=slider]");
  const stops = chart.dataset.stops.split(" ").map(Number);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const distances = stops.map((stop) => Math.abs(stop - x));
    moveCursor(chart, distances.indexOf(Math.min(...distances)));
  });
  svg.addEventListener("keydown", (event) => {
    const now = Number(svg.getAttribute("aria-valuenow")) - 1;
    const targets = { ArrowRight: now + 1, ArrowUp: now + 1, ArrowLeft: now - 1, ArrowDown: now - 1, Home: 0, End: stops.length - 1 };
    if (!(event.key in targets)) return;
    event.preventDefault();
    moveCursor(chart, targets[event.key]);
  });
}

// ---- Start ----

buildForm();
filter();
explorer.hidden = false;
form.addEventListener("input", filter);
form.addEventListener("submit", (event) => event.preventDefault());
form.elements.all.addEventListener("click", () => {
  form.reset();
  filter();
});
explorer.querySelector('[name="previous"]').addEventListener("click", () => turn(-1));
explorer.querySelector('[name="next"]').addEventListener("click", () => turn(1));
dialog.querySelector('[name="close"]').addEventListener("click", () => dialog.close());
dialog.querySelector('[name="previous"]').addEventListener("click", () => step(-1));
dialog.querySelector('[name="next"]').addEventListener("click", () => step(1));
dialog.addEventListener("close", () => explorer.querySelectorAll(".ask")[opened % PAGE]?.focus());
for (const link of document.querySelectorAll("a[data-set]")) {
  link.addEventListener("click", () => {
    form.reset();
    form.elements.set.value = data.sets.findIndex((set) => set.name === link.dataset.set);
    form.elements.kind.value = data.kinds.findIndex((kind) => kind.name === link.dataset.kind);
    filter();
  });
}
document.querySelectorAll(".curve").forEach(bindChart);
const print = document.getElementById("print");
print.hidden = false;
print.addEventListener("click", () => window.print());
window.addEventListener("beforeprint", () => document.querySelectorAll(".card details").forEach((fold) => (fold.open = true)));
