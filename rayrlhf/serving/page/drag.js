// Dragging with mouse, pen or finger: a copy of the element follows the pointer.

const FROM = 5; // pixels before a press becomes a drag
const EDGE = 70; // pixels from the window's edge within which it scrolls

/** Let `handle` drag `element`; `targets(x, y)` gives the place under a point or null. */
export function draggable(element, handle, { targets, drop }) {
  handle.addEventListener("pointerdown", (press) => {
    if (press.button !== 0 || press.target.closest("button")) return;
    let ghost = null;
    let target = null;
    let point = press;
    const box = element.getBoundingClientRect();

    function begin() {
      ghost = element.cloneNode(true);
      ghost.classList.add("lifted");
      ghost.setAttribute("aria-hidden", "true");
      ghost.querySelectorAll("[id]").forEach((each) => each.removeAttribute("id"));
      ghost.style.width = `${box.width}px`;
      document.body.append(ghost);
      element.style.opacity = "0.35";
      document.body.classList.add("dragging");
      requestAnimationFrame(scroll);
    }

    function aim() {
      ghost.style.left = `${box.left + point.clientX - press.clientX}px`;
      ghost.style.top = `${box.top + point.clientY - press.clientY}px`;
      const found = targets(point.clientX, point.clientY);
      if (found?.element !== target?.element) {
        target?.element.classList.remove("over-it");
        found?.element.classList.add("over-it");
      }
      target = found;
    }

    function scroll() {
      if (!ghost) return;
      const below = point.clientY - (window.innerHeight - EDGE);
      const above = EDGE - point.clientY;
      if (below > 0 || above > 0) {
        window.scrollBy(0, below > 0 ? below / 5 : -above / 5);
        aim();
      }
      requestAnimationFrame(scroll);
    }

    function move(event) {
      if (event.pointerId !== press.pointerId) return;
      point = event;
      const far = Math.hypot(event.clientX - press.clientX, event.clientY - press.clientY);
      if (!ghost && far < FROM) return;
      if (!ghost) begin();
      aim();
    }

    function end(event) {
      if (event.type === "keydown" ? event.key !== "Escape" : event.pointerId !== press.pointerId) {
        return;
      }
      for (const [name, listener] of listeners) window.removeEventListener(name, listener);
      if (!ghost) return;
      ghost.remove();
      ghost = null;
      element.style.opacity = "";
      document.body.classList.remove("dragging");
      target?.element.classList.remove("over-it");
      if (event.type === "pointerup" && target) drop(target);
    }

    const listeners = [["pointermove", move], ["pointerup", end], ["pointercancel", end],
      ["keydown", end]];
    for (const [name, listener] of listeners) window.addEventListener(name, listener);
  });
}
