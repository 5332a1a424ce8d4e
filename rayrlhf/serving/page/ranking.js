// A ranking in the making: tiers of tied completions, best first, and a tray of those without a rank.
// Completions are numbers, their places on the page.

export class Ranking {
  constructor(count, tiers = []) {
    this.count = count;
    this.tiers = tiers.map((tier) => [...tier]);
  }

  get tray() {
    return [...Array(this.count).keys()].filter((k) => this.tierOf(k) < 0);
  }

  /** Position of the tier that holds completion k, -1 for the tray. */
  tierOf(k) {
    return this.tiers.findIndex((tier) => tier.includes(k));
  }

  /** Tie k with what has this rank (from 1); beyond the last rank it gets a new, last one. */
  tie(k, rank) {
    const target = this.tiers[rank - 1];
    if (target?.includes(k)) return;
    this.#take(k);
    if (target) target.push(k);
    else this.tiers.push([k]);
    this.#tidy();
  }

  /** Give k a rank of its own before the tier at `position`. */
  insert(k, position) {
    const next = this.tiers[position];
    if (next?.length === 1 && next[0] === k) return;
    this.#take(k);
    this.tiers.splice(position, 0, [k]);
    this.#tidy();
  }

  /** Half a step better (-1) or worse (+1): out of a tie, or into one with the neighbour. */
  step(k, direction) {
    const at = this.tierOf(k);
    if (at < 0) this.insert(k, this.tiers.length);
    else if (this.tiers[at].length > 1) this.insert(k, direction < 0 ? at : at + 1);
    else if (this.tiers[at + direction]) this.tie(k, at + direction + 1);
  }

  /** Take k's rank away. */
  drop(k) {
    this.#take(k);
    this.#tidy();
  }

  /** Tell where k is, in words; `letters` names the completions. */
  describe(k, letters) {
    const at = this.tierOf(k);
    if (at < 0) return "not ranked";
    const others = this.tiers[at].filter((each) => each !== k).map((each) => letters[each]);
    const tied = others.length ? `, tied with ${others.join(" and ")}` : "";
    return `rank ${at + 1} of ${this.tiers.length}${tied}`;
  }

  #take(k) {
    this.tiers.forEach((tier) => {
      if (tier.includes(k)) tier.splice(tier.indexOf(k), 1);
    });
  }

  #tidy() {
    this.tiers = this.tiers.filter((tier) => tier.length > 0);
  }
}
