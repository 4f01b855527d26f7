// Panels as tabs. Without this script they simply stand below each other.
"use strict";

(() => {
  for (const group of document.querySelectorAll("[data-tabs]")) {
    const panels = [...group.querySelectorAll(":scope > [data-tab]")];
    if (panels.length < 2) continue;
    const list = document.createElement("div");
    list.className = "tablist";
    list.setAttribute("role", "tablist");
    list.setAttribute("aria-label", group.getAttribute("aria-label"));
    const tabs = panels.map((panel) => {
      const tab = document.createElement("button");
      tab.type = "button";
      tab.id = `${panel.id}-tab`;
      tab.textContent = panel.dataset.tab;
      tab.setAttribute("role", "tab");
      tab.setAttribute("aria-controls", panel.id);
      panel.setAttribute("role", "tabpanel");
      panel.setAttribute("aria-labelledby", tab.id);
      panel.querySelector("h3").hidden = true;
      list.append(tab);
      return tab;
    });

    const select = (chosen, focus) => {
      tabs.forEach((tab, i) => {
        tab.setAttribute("aria-selected", String(i === chosen));
        tab.tabIndex = i === chosen ? 0 : -1;
        panels[i].hidden = i !== chosen;
      });
      if (focus) tabs[chosen].focus();
    };
    tabs.forEach((tab, i) => {
      tab.addEventListener("click", () => select(i, false));
      tab.addEventListener("keydown", (event) => {
        const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
        if (step) select((i + step + tabs.length) % tabs.length, true);
        else if (event.key === "Home") select(0, true);
        else if (event.key === "End") select(tabs.length - 1, true);
        else return;
        event.preventDefault();
      });
    });
    group.prepend(list);
    select(0, false);
  }
})();
