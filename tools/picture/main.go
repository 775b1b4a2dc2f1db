// Command picture draws a timeline in the format of podfsm as an SVG. Its first argument is the
// file with the text, its second the picture.
package main

import (
	"fmt"
	"html"
	"log"
	"os"
	"regexp"
	"strings"
)

func main() {
	if len(os.Args) != 3 {
		log.Fatal("usage: picture TIMELINE SVG")
	}
	text, err := os.ReadFile(os.Args[1])
	if err == nil {
		err = os.WriteFile(os.Args[2], []byte(draw(string(text))), 0o644)
	}
	if err != nil {
		log.Fatal(err)
	}
}

// The size of a character, in pixels.
const (
	width  = 8.4
	height = 19
)

const (
	ground   = "#0d1117"
	ordinary = "#c9d1d9"
	heading  = "#8b949e"
)

// colours are the colours of the marks in a bar.
var colours = map[byte]string{'=': "#3fb950", 'x': "#f85149", '!': "#f85149", '-': "#58a6ff"}

var (
	bar    = regexp.MustCompile(`\[([ =x!-]+)\]$`)
	run    = regexp.MustCompile(`=+|x+|!+|-+`)
	legend = regexp.MustCompile(`^[=x!-] \w`)
	title  = regexp.MustCompile(`^\S.*, from \S+Z, \S+$`)
)

// draw draws a timeline up to the legend of its marks. The text below is for readers.
func draw(timeline string) string {
	var lines []string
	for line := range strings.Lines(timeline) {
		lines = append(lines, strings.TrimRight(line, "\n"))
		if legend.MatchString(line) {
			break
		}
	}
	var b strings.Builder
	w, h := 82*width, float64(len(lines)+1)*height
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%[1]g" height="%[2]g" viewBox="0 0 %[1]g %[2]g" font-family="monospace" font-size="14">`+"\n", w, h)
	fmt.Fprintf(&b, `<rect width="%g" height="%g" rx="6" fill="%s"/>`+"\n", w, h, ground)
	for i, line := range lines {
		drawLine(&b, line, float64(i+1)*height)
	}
	b.WriteString("</svg>\n")
	return b.String()
}

func drawLine(b *strings.Builder, line string, y float64) {
	if at := bar.FindStringSubmatchIndex(line); at != nil {
		column := len([]rune(line[:at[2]]))
		for _, r := range run.FindAllStringIndex(line[at[2]:at[3]], -1) {
			drawRect(b, column+r[0], r[1]-r[0], y, colours[line[at[2]+r[0]]])
		}
		line = strings.TrimRight(line[:at[0]], " ")
	}
	colour := ordinary
	switch {
	case legend.MatchString(line):
		drawLegend(b, line, y)
		return
	case title.MatchString(line):
		colour = heading
	case strings.HasPrefix(line, "Failed:"):
		colour = colours['x']
	}
	drawText(b, 0, y, colour, line)
}

// drawLegend draws the colour of each mark instead of its character.
func drawLegend(b *strings.Builder, line string, y float64) {
	column := 0
	for _, word := range strings.Split(line, "   ") {
		drawRect(b, column, 1, y, colours[word[0]])
		drawText(b, column+2, y, heading, word[2:])
		column += len(word) + 3
	}
}

func drawRect(b *strings.Builder, column, columns int, y float64, colour string) {
	fmt.Fprintf(b, `<rect x="%.1f" y="%.1f" width="%.1f" height="11" rx="2" fill="%s"/>`+"\n", float64(column+1)*width, y-3, float64(columns)*width, colour)
}

// drawText aligns text to the grid of characters with any font.
func drawText(b *strings.Builder, column int, y float64, colour, text string) {
	if text = strings.TrimRight(text, " "); text == "" {
		return
	}
	characters := len([]rune(text))
	fmt.Fprintf(b, `<text xml:space="preserve" x="%.1f" y="%.1f" textLength="%.1f" fill="%s">%s</text>`+"\n",
		float64(column+1)*width, y+height/3, float64(characters)*width, colour, html.EscapeString(text))
}
