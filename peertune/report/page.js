"use strict";

const dark = matchMedia("(prefers-color-scheme: dark)");
const themes = JSON.parse(document.getElementById("themes").textContent);
const plots = [];
let busy = 0;

function theme(isDark) {
  return structuredClone(isDark ? themes.dark : themes.light); // plotly writes into what it is given
}

function draw(figure) {
  const { data, layout, frames } = JSON.parse(figure.querySelector(".data").textContent);
  const plot = figure.querySelector(".plot");
  layout.template = theme(dark.matches);
  const config = { responsive: true, displaylogo: false };
  plots.push(plot);
  const slider = figure.querySelector("input");
  if (slider) {
    const output = figure.querySelector("output");
    slider.addEventListener("input", () => {
      const name = frames[slider.valueAsNumber].name;
      output.textContent = "round " + name;
      slider.setAttribute("aria-valuetext", output.textContent);
      const now = { mode: "immediate", transition: { duration: 0 }, frame: { duration: 0, redraw: true } };
      Plotly.animate(plot, [name], now).catch(() => {}); // the next step came before this one was drawn
    });
  }
  return Plotly.newPlot(plot, { data, layout, frames: frames || [], config });
}

async function whileBusy(drawings) {
  busy += 1;
  document.body.setAttribute("aria-busy", "true");
  await Promise.all(drawings);
  busy -= 1;
  document.body.setAttribute("aria-busy", String(busy > 0));
}

function show() {
  const figures = [...document.querySelectorAll("figure")];
  const due = figures.filter((figure) => !figure.querySelector(".js-plotly-plot") && !figure.closest("[hidden]"));
  whileBusy(due.map(draw));
}

function paint(isDark) {
  whileBusy(plots.map((plot) => Plotly.relayout(plot, { template: theme(isDark) })));
}

dark.addEventListener("change", () => paint(dark.matches));
addEventListener("beforeprint", () => paint(false));
addEventListener("afterprint", () => paint(dark.matches));

const choice = document.getElementById("choice");
if (choice) {
  const choose = () => {
    for (const run of document.querySelectorAll(".run")) run.hidden = run.id !== choice.value;
    show();
  };
  choice.addEventListener("change", choose);
  choose(); // a browser that goes back keeps what was chosen
}
show();
