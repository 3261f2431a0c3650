$("title").textContent = document.title;
fillTerms($("about"), { Model: data.about.model, Prompts: data.about.prompts,
  "Visual tokens": data.about.visual, Conditions: data.about.conditions,
  Command: data.about.command });
for (const { title, text, head, rows, light, dark } of data.figures) {
  const row = (cells) => make("tr", {}, ...cells.map((cell, i) =>
    make(i ? "td" : "th", i ? {} : { scope: "row" }, cell)));
  const picture = make("picture", {},
    make("source", { srcset: dark, media: "(prefers-color-scheme: dark)" }),
    make("img", { src: light, alt: `${title}. ${text}` }));
  const table = make("table", {},
    make("thead", {}, make("tr", {}, ...head.map((t) => make("th", { scope: "col" }, t)))),
    make("tbody", {}, ...rows.map(row)));
  $("figures").append(make("section", {}, make("h2", {}, title),
    make("figure", {}, picture, make("figcaption", {}, text)),
    make("details", {}, make("summary", {}, "The numbers"), make("div", { class: "scroll" }, table))));
}
document.documentElement.dataset.ready = "true";
