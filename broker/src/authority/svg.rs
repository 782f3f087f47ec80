//! The graph as a picture, without any other program: devices on the left with what each has to
//! itself, the vCPU process and the broker on the right, and between them what they share.

use super::graph::{Graph, Sort, Thing};
use std::collections::BTreeMap;
use std::fmt::Write as _;

const LINE: usize = 16;
const PADDING: usize = 8;
const GAP: usize = 14;
/// Left edges of the columns: own things, devices, shared things, vCPU and broker, their own things.
const COLUMNS: [usize; 5] = [10, 330, 500, 860, 1030];
const WIDTHS: [usize; 5] = [260, 110, 260, 110, 260];
const PICTURE_WIDTH: usize = 1300;
/// Longest text in a box, in characters.
const CHARS_MAX: usize = 38;

/// A box in the making.
struct Node {
    column: usize,
    lines: Vec<String>,
    process: bool,
}

impl Node {
    fn height(&self) -> usize {
        self.lines.len() * LINE + 2 * PADDING
    }
}

/// Where a box is: column, upper edge, height.
type Place = (usize, usize, usize);

/// The picture.
#[must_use]
pub fn render(graph: &Graph) -> String {
    let bundles = graph.bundles();
    let (right, left): (Vec<&str>, Vec<&str>) = graph
        .processes
        .iter()
        .map(String::as_str)
        .partition(|name| name.starts_with("vcpu") || *name == "broker");
    let mut picture = Picture::default();
    let mut things: Vec<(Vec<&str>, Place)> = Vec::new();
    let mut processes: BTreeMap<&str, Place> = BTreeMap::new();
    let mut drawn: Vec<&Vec<&str>> = Vec::new();
    let mut below = GAP;
    for (processes_here, column) in [(&left, 1), (&right, 3)] {
        let mut own_column_end = GAP;
        for &process in processes_here {
            let mine: Vec<_> = bundles
                .iter()
                .filter(|(with, _)| with.contains(&process))
                .collect();
            let top = if column == 1 { below } else { own_column_end };
            let (mut own_at, mut shared_at) = (top, top);
            for (with, bundle) in mine {
                let own = with.len() == 1;
                if drawn.contains(&with) {
                    continue;
                }
                drawn.push(with);
                let node = Node {
                    column: if own {
                        if column == 1 { 0 } else { 4 }
                    } else {
                        2
                    },
                    lines: lines(bundle),
                    process: false,
                };
                let at = if own { &mut own_at } else { &mut shared_at };
                // What only the right side shares has its place under everything else.
                if !own && column == 3 {
                    *at = below;
                }
                let place = picture.put(&node, *at);
                *at += node.height() + GAP;
                if !own && column == 3 {
                    below = *at;
                }
                things.push((with.clone(), place));
            }
            let node = Node {
                column,
                lines: vec![process.to_owned()],
                process: true,
            };
            let place = picture.put(&node, top);
            processes.insert(process, place);
            let bottom = own_at.max(top + node.height() + GAP);
            if column == 1 {
                below = bottom.max(shared_at);
            } else {
                own_column_end = bottom;
            }
        }
        below = below.max(own_column_end);
    }
    for (with, thing) in &things {
        for place in with.iter().filter_map(|process| processes.get(process)) {
            picture.connect(*place, *thing);
        }
    }
    picture.finish()
}

/// What a box says; doorbells, which are all alike, as their number.
fn lines(things: &[&Thing]) -> Vec<String> {
    let mut lines = Vec::new();
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for thing in things {
        let name = match thing.sort {
            Sort::Doorbell => "doorbells",
            Sort::Pipe => "pipes",
            _ => {
                lines.push(shortened(&thing.label));
                continue;
            }
        };
        *counts.entry(name).or_default() += 1;
    }
    lines.extend(counts.iter().map(|(name, count)| format!("{count} {name}")));
    lines
}

/// The end of a long text says more than its beginning: it is a path.
fn shortened(text: &str) -> String {
    let count = text.chars().count();
    if count <= CHARS_MAX {
        return text.to_owned();
    }
    let end: String = text.chars().skip(count + 1 - CHARS_MAX).collect();
    format!("…{end}")
}

#[derive(Default)]
struct Picture {
    boxes: String,
    lines: String,
    height: usize,
}

// Writing to a string cannot fail, so results are dropped below.
impl Picture {
    fn put(&mut self, node: &Node, top: usize) -> Place {
        let (x, width) = (COLUMNS[node.column], WIDTHS[node.column]);
        let height = node.height();
        let class = if node.process { "p" } else { "t" };
        let _infallible = writeln!(
            self.boxes,
            r#"<rect class="{class}" x="{x}" y="{top}" width="{width}" height="{height}" rx="4"/>"#
        );
        for (n, line) in node.lines.iter().enumerate() {
            let (x, y) = (x + PADDING, top + PADDING + n * LINE + 12);
            let line = in_xml(line);
            let _infallible = writeln!(self.boxes, r#"<text x="{x}" y="{y}">{line}</text>"#);
        }
        self.height = self.height.max(top + height + GAP);
        (node.column, top, height)
    }

    fn connect(&mut self, a: Place, b: Place) {
        let (left, right) = if a.0 < b.0 { (a, b) } else { (b, a) };
        let middle = |place: Place| place.1 + place.2 / 2;
        let from = COLUMNS[left.0] + WIDTHS[left.0];
        let (to, y1, y2) = (COLUMNS[right.0], middle(left), middle(right));
        let bend = usize::midpoint(from, to);
        let _infallible = writeln!(
            self.lines,
            r#"<path d="M{from} {y1} C{bend} {y1} {bend} {y2} {to} {y2}"/>"#
        );
    }

    fn finish(self) -> String {
        let Self {
            boxes,
            lines,
            height,
        } = self;
        format!(
            r##"<svg xmlns="http://www.w3.org/2000/svg" width="{PICTURE_WIDTH}" height="{height}" font-family="sans-serif" font-size="12">
<style>rect.p{{fill:#dbe7f5;stroke:#234;stroke-width:2}}rect.t{{fill:#fff;stroke:#888}}path{{fill:none;stroke:#888}}</style>
<rect width="100%" height="100%" fill="#fff"/>
{lines}{boxes}</svg>
"##
        )
    }
}

/// Text between tags.
fn in_xml(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            c if c.is_control() => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::graph::Reach;
    use super::*;

    fn thing(label: &str, processes: &[&str]) -> Thing {
        let reach = |process: &&str| Reach {
            process: (*process).to_owned(),
            access: "rw".to_owned(),
            descriptors: vec![5],
            mapped: false,
        };
        Thing {
            label: label.to_owned(),
            sort: Sort::Memory,
            is_common: false,
            reached_by: processes.iter().map(reach).collect(),
        }
    }

    #[test]
    fn every_process_and_thing_is_drawn_and_connected() {
        let graph = Graph {
            processes: ["vcpu0.1", "blk0.1", "broker"].map(str::to_owned).to_vec(),
            things: vec![
                thing("window", &["vcpu0.1", "blk0.1"]),
                thing("disk <1>", &["blk0.1"]),
                thing("page", &["vcpu0.1", "broker"]),
                thing("guest", &["vcpu0.1"]),
            ],
        };
        let picture = render(&graph);
        for text in [
            "vcpu0.1",
            "blk0.1",
            "broker",
            "window",
            "disk &lt;1&gt;",
            "page",
            "guest",
        ] {
            assert!(picture.contains(&format!(">{text}</text>")), "{text}");
        }
        assert_eq!(picture.matches("<path").count(), 6);
        // No box is on top of another one.
        let number = |line: &str, name: &str| -> usize {
            let (_, rest) = line.split_once(&format!(" {name}=\"")).unwrap();
            rest.split_once('"').unwrap().0.parse().unwrap()
        };
        let boxes: Vec<[usize; 4]> = picture
            .lines()
            .filter(|line| line.starts_with("<rect class"))
            .map(|line| ["x", "y", "width", "height"].map(|name| number(line, name)))
            .collect();
        for (n, a) in boxes.iter().enumerate() {
            for b in &boxes[n + 1..] {
                let apart = |i: usize| a[i] + a[i + 2] <= b[i] || b[i] + b[i + 2] <= a[i];
                assert!(apart(0) || apart(1), "{a:?} {b:?}");
            }
        }
    }
}
